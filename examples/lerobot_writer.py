"""Write episodes as a LeRobot v3.0 data set, in the layout of the Hub's `lerobot/pusht`.

Each table is one file, and so is the video. LeRobot and [`smolandfast.training.LeRobotChunkDataset`] read it.
"""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smolandfast.checks_smolandfast import as_numbers, check_whole
from smolandfast.files_smolandfast import atomic_write, check_new_folder

IMAGE_KEY = "observation.image"
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
SCALARS = {"next.reward": "float32", "next.done": "bool", "next.success": "bool", "timestamp": "float32"}
SCALARS |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")


def write_dataset(
    root: Path,
    episodes: Iterator[dict],
    fps: int,
    robot_type: str,
    axes: dict[str, list[str]],
    image_size: int,
    crf: int = 18,
    pix_fmt: str = "yuv420p",
) -> dict:
    """Write a data set from an iterator of episodes. The folder appears once the data set is complete.

    Args:
        root: New or empty folder.
        episodes: Each has `task`, the instruction, and arrays of T steps: `observation.image` uint8
            `(T, image_size, image_size, 3)`, the features of `axes` `(T, dim)`, `next.reward`, `next.done` and
            `next.success` `(T,)`. Everything but the images is kept in memory.
        fps: Steps a second.
        robot_type: For `meta/info.json`.
        axes: Names of the dimensions of `observation.state`, `action` and other vectors.
        image_size: Pixels along each side of the images.
        crf: x264's quality, lower is better. At 18, PushT's pusher is at most about one pixel (of 96) off.
        pix_fmt: Of the video. `yuv420p` halves the resolution of colours, which `yuv444p` keeps.

    Returns:
        The content of `meta/info.json`.

    Raises:
        ValueError: No episode, or one that is not as described.
        OSError: The folder is not empty (`FileExistsError`), or cannot be written.
    """
    check_new_folder(root)
    check_whole(fps, "fps")
    check_whole(image_size, "image_size")
    features = _features(fps, axes, image_size, pix_fmt)
    with atomic_write(root) as folder:
        video_path = folder / f"videos/{IMAGE_KEY}/chunk-000/file-000.mp4"
        video_path.parent.mkdir(parents=True)
        columns: dict[str, list[np.ndarray]] = {name: [] for name in features if name != IMAGE_KEY}
        histograms, rows, start, tasks = [], [], 0, {}
        with av.open(str(video_path), "w") as container:
            # Every second frame is a key frame, so that reading a frame decodes at most two.
            options = {"g": "2", "crf": str(crf)}
            stream = container.add_stream("libx264", rate=fps, pix_fmt=pix_fmt, options=options)
            stream.width = stream.height = image_size
            stream.time_base = Fraction(1, fps)
            for number, episode in enumerate(episodes):
                episode = _check_episode(episode, f"episodes[{number}]", axes, image_size)
                images, task = episode[IMAGE_KEY], episode["task"]
                for i, image in enumerate(images, start):
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    frame.pts = i
                    container.mux(stream.encode(frame))
                frame_index = np.arange(len(images))
                episode["timestamp"] = frame_index / fps
                episode["frame_index"] = frame_index
                episode["episode_index"] = np.full_like(frame_index, number)
                episode["index"] = frame_index + start
                episode["task_index"] = np.full_like(frame_index, tasks.setdefault(task, len(tasks)))
                for name, values in columns.items():
                    values.append(episode[name].astype(features[name]["dtype"]))
                histograms.append(np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)]))
                statistics = _statistics({name: values[-1] for name, values in columns.items()}, histograms[-1])
                rows.append(_episode_row(number, start, len(images), fps, task, statistics))
                start += len(images)
            container.mux(stream.encode(None))
        if not rows:
            raise ValueError("There is no episode to write. Record at least one.")
        frames = {name: np.concatenate(values) for name, values in columns.items()}
        _write_tables(folder, frames, rows, tasks)
        info = {
            "codebase_version": "v3.0",
            "robot_type": robot_type,
            "total_episodes": len(rows),
            "total_frames": start,
            "total_tasks": len(tasks),
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": fps,
            "splits": {"train": f"0:{len(rows)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            "features": features,
        }
        for name, content in {"info": info, "stats": _statistics(frames, sum(histograms))}.items():
            (folder / f"meta/{name}.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    return info


def _check_episode(episode: dict, name: str, axes: dict[str, list[str]], image_size: int) -> dict:
    """The task and the arrays of an episode, checked."""
    outcomes = ("next.reward", "next.done", "next.success")
    missing = [key for key in ("task", IMAGE_KEY, *axes, *outcomes) if key not in episode]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}, only {sorted(episode)}. Record all of them.")
    task, images = episode["task"], np.asarray(episode[IMAGE_KEY])
    if not isinstance(task, str) or not task.strip():
        raise ValueError(f"{name}: task is {task!r}, expected an instruction.")
    if images.shape[1:] != (image_size, image_size, 3) or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(
            f"{name}: {IMAGE_KEY} is {images.dtype} of shape {images.shape}, expected uint8 of shape "
            f"(T, {image_size}, {image_size}, 3) with at least one step. Convert or resize the images first."
        )
    shapes = {key: (len(images), len(names)) for key, names in axes.items()}
    shapes |= dict.fromkeys(outcomes, (len(images),))
    arrays = {"task": task, IMAGE_KEY: images}
    for key, shape in shapes.items():
        values = as_numbers(episode[key], f"{name}: {key}", shape)
        with np.errstate(over="ignore"):  # too large numbers become infinite
            arrays[key] = as_numbers(values.astype(np.float32), f"{name}: {key} in float32")
    return arrays


def _features(fps: int, axes: dict[str, list[str]], image_size: int, pix_fmt: str) -> dict[str, dict]:
    image = {
        "dtype": "video",
        "shape": [image_size, image_size, 3],
        "names": ["height", "width", "channel"],
        "info": {
            "video.height": image_size,
            "video.width": image_size,
            "video.codec": "h264",
            "video.pix_fmt": pix_fmt,
            "video.is_depth_map": False,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
        },
    }
    vectors = {name: {"dtype": "float32", "shape": [len(a)], "names": {"axes": a}} for name, a in axes.items()}
    scalars = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in SCALARS.items()}
    return {IMAGE_KEY: image} | vectors | scalars


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


def _episode_row(number: int, start: int, length: int, fps: int, task: str, statistics: dict[str, dict]) -> dict:
    """A row of LeRobot's table of episodes."""
    video = f"videos/{IMAGE_KEY}"
    return {
        "episode_index": number,
        "tasks": [task],
        "length": length,
        "data/chunk_index": 0,
        "data/file_index": 0,
        "dataset_from_index": start,
        "dataset_to_index": start + length,
        f"{video}/chunk_index": 0,
        f"{video}/file_index": 0,
        f"{video}/from_timestamp": start / fps,
        f"{video}/to_timestamp": (start + length) / fps,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    } | {f"stats/{name}/{kind}": value for name, kinds in statistics.items() for kind, value in kinds.items()}


def _statistics(columns: dict[str, np.ndarray], histogram: np.ndarray) -> dict[str, dict]:
    """LeRobot's statistics of each feature; those of images from a histogram `(3, 256)`, per channel in [0, 1]."""
    channels = [_summary(np.flatnonzero(counts) / 255, counts[counts > 0]) for counts in histogram]
    statistics = {IMAGE_KEY: {kind: [[[channel[kind]]] for channel in channels] for kind in channels[0]}}
    for name, values in columns.items():
        axes = [_summary(axis) for axis in values.reshape(len(values), -1).T.astype(np.float64)]
        statistics[name] = {kind: [axis[kind] for axis in axes] for kind in axes[0]}
    return {name: kinds | {"count": [len(columns["index"])]} for name, kinds in statistics.items()}


def _summary(values: np.ndarray, counts: np.ndarray | None = None) -> dict[str, float]:
    """Statistics of numbers `(N,)`; the i-th occurs `counts[i]` times, by default once."""
    mean = np.average(values, weights=counts)
    std = np.sqrt(np.average((values - mean) ** 2, weights=counts))
    method = "linear" if counts is None else "inverted_cdf"
    quantiles = np.quantile(values, list(QUANTILES.values()), weights=counts, method=method)
    numbers = [values.min(), values.max(), mean, std, *quantiles]
    return dict(zip(("min", "max", "mean", "std", *QUANTILES), map(float, numbers), strict=True))
