"""Write episodes as a LeRobot v3.0 data set, in the layout of the Hub's `lerobot/pusht` or of `lerobot-record`.

Each table is one file, and so is the video of each camera. LeRobot and [`smolandfast.training.LeRobotChunkDataset`]
read it.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from smolandfast.checks_smolandfast import as_numbers, check_whole
from smolandfast.files_smolandfast import atomic_write, check_new_folder

IMAGE_KEY = "observation.image"
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
OUTCOMES = {"next.reward": "float32", "next.done": "bool", "next.success": "bool"}
INDICES = {"timestamp": "float32"} | dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
# x264's options. Of every two frames one is a key frame, so that reading a frame decodes at most two; or every image
# that differs from the one before it is a key frame, ten times as fast where most do not.
EVERY_SECOND = {"g": "2"}
NEW_IMAGES = {"g": "250", "bf": "0", "forced-idr": "1", "sc_threshold": "0", "preset": "ultrafast", "threads": "1"}


@dataclass(frozen=True)
class Layout:
    """How a data set is laid out.

    Args:
        fps: Steps a second.
        robot_type: For `meta/info.json`.
        axes: Names of the dimensions of `observation.state`, `action` and other vectors.
        image_size: Pixels along each side of the images.
        image_keys: The cameras.
        crf: x264's quality, lower is better. At 18, PushT's pusher is at most about one pixel (of 96) off.
        pix_fmt: Of the videos. `yuv420p` halves the resolution of colours, which `yuv444p` keeps.
        images_repeat: Most images are those of the step before, and the others become key frames.
        is_recording: As `lerobot-record` writes it: without outcomes (`next.*`), with plain lists of names.
    """

    fps: int
    robot_type: str
    axes: dict[str, list[str]]
    image_size: int
    image_keys: tuple[str, ...] = (IMAGE_KEY,)
    crf: int = 18
    pix_fmt: str = "yuv420p"
    images_repeat: bool = False
    is_recording: bool = False

    def __post_init__(self):
        check_whole(self.fps, "fps")
        check_whole(self.image_size, "image_size")

    @property
    def outcomes(self) -> dict[str, str]:
        return {} if self.is_recording else OUTCOMES

    @property
    def encoding(self) -> dict[str, str]:
        return (NEW_IMAGES if self.images_repeat else EVERY_SECOND) | {"crf": str(self.crf)}

    @property
    def features(self) -> dict[str, dict]:
        """As in `meta/info.json`."""
        vectors = {
            name: {"dtype": "float32", "shape": [len(axes)], "names": axes if self.is_recording else {"axes": axes}}
            for name, axes in self.axes.items()
        }
        images = dict.fromkeys(self.image_keys, self._image_feature())
        numbers = self.outcomes | INDICES
        scalars = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in numbers.items()}
        return (vectors | images if self.is_recording else images | vectors) | scalars

    def _image_feature(self) -> dict[str, Any]:
        depth = "is_depth_map" if self.is_recording else "video.is_depth_map"
        info = {
            "video.height": self.image_size,
            "video.width": self.image_size,
            "video.codec": "h264",
            "video.pix_fmt": self.pix_fmt,
            depth: False,
            "video.fps": self.fps,
            "video.channels": 3,
            "has_audio": False,
        }
        if self.is_recording:
            info |= {"video.g": int(self.encoding["g"]), "video.crf": self.crf, "video.fast_decode": 0}
            info |= {"video.preset": self.encoding.get("preset", "medium"), "video.video_backend": "pyav"}
            info["video.extra_options"] = {}
        names = ["height", "width", "channels" if self.is_recording else "channel"]
        return {"dtype": "video", "shape": [self.image_size, self.image_size, 3], "names": names, "info": info}


def write_dataset(root: Path, episodes: Iterator[dict], **kwargs: Any) -> dict:
    """Write a data set from an iterator of episodes. The folder appears once the data set is complete.

    Args:
        root: New or empty folder.
        episodes: Each has `task`, the instruction, and arrays of T steps: for each camera uint8
            `(T, image_size, image_size, 3)`, the features of `axes` `(T, dim)` and, unless `is_recording`,
            `next.reward`, `next.done` and `next.success` `(T,)`. Everything but the images is kept in memory.
        kwargs: See [`Layout`].

    Returns:
        The content of `meta/info.json`.

    Raises:
        ValueError: No episode, or one that is not as described.
        OSError: The folder is not empty (`FileExistsError`), or cannot be written.
    """
    check_new_folder(root)
    layout = Layout(**kwargs)
    features = layout.features
    with atomic_write(root) as folder:
        columns: dict[str, list[np.ndarray]] = {name: [] for name in features if name not in layout.image_keys}
        rows, start, tasks = [], 0, {}
        totals = dict.fromkeys(layout.image_keys, 0)  # histograms
        with contextlib.ExitStack() as stack:
            videos = {key: _Video(folder / f"videos/{key}/chunk-000/file-000.mp4", layout) for key in totals}
            for video in videos.values():
                stack.callback(video.container.close)
            for number, episode in enumerate(episodes):
                episode = _check_episode(episode, f"episodes[{number}]", layout)
                length, task = len(episode["action"]), episode["task"]
                histograms = {key: video.write(episode[key]) for key, video in videos.items()}
                frame_index = np.arange(length)
                episode["timestamp"] = frame_index / layout.fps
                episode["frame_index"] = frame_index
                episode["episode_index"] = np.full_like(frame_index, number)
                episode["index"] = frame_index + start
                episode["task_index"] = np.full_like(frame_index, tasks.setdefault(task, len(tasks)))
                for name, values in columns.items():
                    values.append(episode[name].astype(features[name]["dtype"]))
                totals = {key: totals[key] + histogram for key, histogram in histograms.items()}
                statistics = _statistics({name: values[-1] for name, values in columns.items()}, histograms)
                rows.append(_episode_row(number, start, length, task, layout, statistics))
                start += length
            for video in videos.values():
                video.finish()
        if not rows:
            raise ValueError("There is no episode to write. Record at least one.")
        frames = {name: np.concatenate(values) for name, values in columns.items()}
        _write_tables(folder, frames, rows, tasks)
        info = {
            "codebase_version": "v3.0",
            "robot_type": layout.robot_type,
            "total_episodes": len(rows),
            "total_frames": start,
            "total_tasks": len(tasks),
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": layout.fps,
            "splits": {"train": f"0:{len(rows)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            "features": features,
        }
        for name, content in {"info": info, "stats": _statistics(frames, totals)}.items():
            (folder / f"meta/{name}.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    return info


class _Video:
    """The video of one camera."""

    def __init__(self, path: Path, layout: Layout):
        path.parent.mkdir(parents=True)
        self.layout, self.length, self.reformatter = layout, 0, VideoReformatter()
        self.container = av.open(str(path), "w")
        options = {"rate": layout.fps, "pix_fmt": layout.pix_fmt, "options": layout.encoding}
        self.stream = self.container.add_stream("libx264", **options)
        self.stream.width = self.stream.height = layout.image_size
        self.stream.time_base = Fraction(1, layout.fps)

    def write(self, images: np.ndarray) -> np.ndarray:
        """Append images `(T, H, W, 3)`; returns how often each value occurs in each channel, `(3, 256)`."""
        is_new = [i == 0 or not np.array_equal(images[i], images[i - 1]) for i in range(len(images))]
        for image, new in zip(images, is_new, strict=True):
            if new:
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame = self.reformatter.reformat(frame, format=self.layout.pix_fmt)
            if self.layout.images_repeat:
                frame.pict_type = PictureType.I if new else PictureType.NONE
            frame.pts = self.length
            self.container.mux(self.stream.encode(frame))
            self.length += 1
        starts = np.flatnonzero(is_new)
        counts = zip(starts, np.diff([*starts, len(images)]), strict=True)
        return sum(
            n * np.stack([np.bincount(images[i, ..., c].ravel(), minlength=256) for c in range(3)]) for i, n in counts
        )

    def finish(self) -> None:
        self.container.mux(self.stream.encode(None))


def _check_episode(episode: dict, name: str, layout: Layout) -> dict:
    """The task and the arrays of an episode, checked."""
    keys, size = layout.image_keys, layout.image_size
    missing = [key for key in ("task", *keys, *layout.axes, *layout.outcomes) if key not in episode]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}, only {sorted(episode)}. Record all of them.")
    task, arrays = episode["task"], {key: np.asarray(episode[key]) for key in keys}
    if not isinstance(task, str) or not task.strip():
        raise ValueError(f"{name}: task is {task!r}, expected an instruction.")
    length = len(arrays[keys[0]])
    for key, images in arrays.items():
        if images.shape != (length, size, size, 3) or images.dtype != np.uint8 or length == 0:
            raise ValueError(
                f"{name}: {key} is {images.dtype} of shape {images.shape}, expected uint8 of shape "
                f"(T, {size}, {size}, 3) with at least one step. Convert or resize the images first."
            )
    shapes = {key: (length, len(names)) for key, names in layout.axes.items()}
    shapes |= dict.fromkeys(layout.outcomes, (length,))
    for key, shape in shapes.items():
        values = as_numbers(episode[key], f"{name}: {key}", shape)
        with np.errstate(over="ignore"):  # too large numbers become infinite
            arrays[key] = as_numbers(values.astype(np.float32), f"{name}: {key} in float32")
    return arrays | {"task": task}


def _write_tables(root: Path, frames: dict[str, np.ndarray], episode_rows: list[dict], tasks: dict[str, int]) -> None:
    columns = {
        name: pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1]) if values.ndim == 2 else values
        for name, values in frames.items()
    }
    # LeRobot reads the tasks with pandas, and expects the instruction in the index.
    dtypes = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    fields = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype, "metadata": None}
        for name, (kind, dtype) in dtypes.items()
    ]
    pandas = json.dumps({"index_columns": ["task"], "column_indexes": [], "columns": fields})
    table = {"task_index": list(tasks.values()), "task": list(tasks)}
    tables = {
        "data/chunk-000/file-000.parquet": pa.table(columns),
        "meta/episodes/chunk-000/file-000.parquet": pa.Table.from_pylist(episode_rows),
        "meta/tasks.parquet": pa.table(table, metadata={"pandas": pandas}),
    }
    for name, table in tables.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / name)


def _episode_row(
    number: int, start: int, length: int, task: str, layout: Layout, statistics: dict[str, dict]
) -> dict[str, Any]:
    """A row of LeRobot's table of episodes."""
    row = {
        "episode_index": number,
        "tasks": [task],
        "length": length,
        "data/chunk_index": 0,
        "data/file_index": 0,
        "dataset_from_index": start,
        "dataset_to_index": start + length,
    }
    for key in layout.image_keys:
        row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
        row[f"videos/{key}/from_timestamp"] = start / layout.fps
        row[f"videos/{key}/to_timestamp"] = (start + length) / layout.fps
    row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
    return row | {f"stats/{name}/{kind}": value for name, kinds in statistics.items() for kind, value in kinds.items()}


def _statistics(columns: dict[str, np.ndarray], histograms: dict[str, np.ndarray]) -> dict[str, dict]:
    """LeRobot's statistics of each feature; those of images from histograms `(3, 256)`, per channel in [0, 1]."""
    statistics = {}
    for key, histogram in histograms.items():
        channels = [_summary(np.flatnonzero(counts) / 255, counts[counts > 0]) for counts in histogram]
        statistics[key] = {kind: [[[float(channel[kind])]] for channel in channels] for kind in channels[0]}
    for name, values in columns.items():
        axes = np.ascontiguousarray(values.reshape(len(values), -1).T, dtype=np.float64)
        statistics[name] = {kind: numbers.tolist() for kind, numbers in _summary(axes).items()}
    return {name: kinds | {"count": [len(columns["index"])]} for name, kinds in statistics.items()}


def _summary(values: np.ndarray, counts: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Statistics along the last axis; the i-th number occurs `counts[i]` times, by default once."""
    mean = np.average(values, axis=-1, weights=counts)
    std = np.sqrt(np.average((values - mean[..., None]) ** 2, axis=-1, weights=counts))
    method = "linear" if counts is None else "inverted_cdf"
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=-1, weights=counts, method=method)
    numbers = [values.min(-1), values.max(-1), mean, std, *quantiles]
    return dict(zip(("min", "max", "mean", "std", *QUANTILES), numbers, strict=True))
