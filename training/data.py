"""Read a LeRobot v3.0 data set as (images, task, state, action chunk) samples.

`meta/` holds JSON and the table of episodes, `data/` the low-dimensional frames as parquet, and `videos/` one stream
per camera, with many consecutive episodes in each mp4. Images are decoded when a sample is asked for; `frames.py` says
how, and which ones are kept.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import httpx  # httpx2 since release 2.0
from transformers.utils import logging

from ..checks_smolandfast import as_value_error, check_fps, check_whole
from ..files_smolandfast import read_json
from ..normalization_smolandfast import ACTION, STATE
from .frames import AGAIN, INFO, FrameReader, ImageFile, Resizer

logger = logging.get_logger(__name__)

# LeRobot's defaults of the two templates in meta/info.json.
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
CONVERT = (
    "Convert a copy of it with LeRobot 0.6: `python -m lerobot.scripts.convert_dataset_v21_to_v30 "
    "--repo-id=you/your-data --root=COPY --push-to-hub=false`, which downloads COPY if there is no such folder."
)
# Attributes that joined data sets share. Names may be None in some of them.
SHARED = ("fps", "state_dim", "action_dim", "image_keys", "image_sizes", "chunk_size", "frame_stride")
SHARED += ("state_names", "action_names")


def download_dataset(repo_id: str, revision: str | None = None) -> Path:
    """Download a data set from the Hub, or find it in the Hub's cache, and return its folder.

    Raises:
        OSError: The Hub cannot be reached, or has no such data set or revision.
    """
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision))
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise OSError(
            f"Cannot download the data set {repo_id!r} (revision {revision or 'main'}) from the hub: {error} "
            "Check its name and the network, or name the folder of a local copy instead."
        ) from error


def evenly_spaced(size: int, most: int) -> np.ndarray:
    """At most `most` indices below `size`, the first and the last among them: `(n,)` int64."""
    return np.linspace(0, size - 1, min(size, most)).round().astype(np.int64)


class _ChunkedFrames(torch.utils.data.Dataset):
    """Tasks and action chunks by the index of a frame, in single and joined data sets."""

    def text(self, i: int) -> str:
        """A frame's task."""
        return self._texts[i]

    @property
    def episode_starts(self) -> np.ndarray:
        """The index of the first frame of each episode: `(n,)`."""
        return np.flatnonzero(np.diff(self.episode_end, prepend=-1))

    def action_chunks(self, indices: Sequence[int] | None = None) -> np.ndarray:
        """The chunks of these samples, of all by default: `(n, chunk_size, action_dim)` float32."""
        return self._chunks(_as_indices("indices", indices, len(self)))

    def _chunks(self, indices: np.ndarray) -> np.ndarray:
        rows = indices[:, None] + np.arange(self.chunk_size) * self.frame_stride  # (n, chunk_size)
        return self.actions[np.minimum(rows, self.episode_end[indices, None])]


class LeRobotChunkDataset(_ChunkedFrames):
    """Every frame of the chosen episodes, each with the `chunk_size` actions that start at it.

    A sample is `{"images": [uint8 (H, W, 3), one per image key], "text": the task, "state": float32 (state_dim,),
    "actions": float32 (chunk_size, action_dim)}`, in the robot's units.

    Past its episode's end, a chunk repeats the episode's last action. For position targets this means "hold"; for
    velocities it means "keep moving": there, choose a `chunk_size` that is short compared to the episodes.

    Images are decoded when they are asked for. Those of at most 100 kB a frame of all cameras, such as two of 128x128
    pixels, are kept in a cache once they are decoded; larger ones are decoded each time, so let `resize_images` make
    them smaller. Use it in any number of worker processes; each decodes on one thread.

    Args:
        root: Folder of the data set. It is only read, and needs only the files of the chosen episodes.
        chunk_size: Actions in a chunk, at least 1.
        episodes: Indices of the episodes to read, in this order; all by default.
        image_keys: Features to read as images, in this order; all of dtype `video` or `image` by default, except
            depth maps, which cannot be read.
        cache_dir: Folder of the decoded frames; `smolandfast` in `$XDG_CACHE_HOME` or `~/.cache` by default. It may be
            deleted at any time. A file whose path, size or modification time changed is decoded again. False keeps no
            frames.
        cache_every: Only every so many frames of an episode are kept in the cache; the others, which take no room
            there, are decoded each time.
        frame_stride: Frames from one action of a chunk to the next. With 2, a policy that executes an action every
            1 / fps seconds moves at twice the demonstrated speed.

    Attributes:
        info: `meta/info.json`.
        image_keys, state_dim, action_dim, fps: Those of the samples.
        state_names, action_names: Names of the dimensions; None where the data set has none.
        image_sizes: Height and width of each camera's images as recorded, by image key.
        states, actions: `(N, state_dim)` and `(N, action_dim)` float32 of the chosen frames.
        tasks: The instructions of the chosen frames, each once.
        episode_index, frame_index: `(N,)`, the episode of each frame and its index there.
        episode_end: `(N,)`, the index of the last frame of each frame's episode.

    Raises:
        ValueError: An argument or the content of a file is wrong. What only decoding shows, such as a damaged frame,
            is raised when that frame is asked for.
        OSError: A file is missing or unreadable. Reading a sample: also, the cache cannot be written, or the disk has
            less room than it needs, which is found before anything is written.
    """

    def __init__(
        self,
        root: str | Path,
        chunk_size: int,
        episodes: Sequence[int] | None = None,
        image_keys: Sequence[str] | None = None,
        cache_dir: str | Path | Literal[False] | None = None,
        frame_stride: int = 1,
        cache_every: int = 1,
    ):
        self.chunk_size = check_whole(chunk_size, "chunk_size")
        self._cache_every = check_whole(cache_every, "cache_every")
        self.frame_stride = check_whole(frame_stride, "frame_stride")
        self.root = Path(root).expanduser()
        self.info = read_info(self.root)
        self.fps = self.info["fps"]
        features = self.info["features"]
        self.image_keys = _choose_image_keys(image_keys, features)
        self.state_dim, self.action_dim = (_vector_dim(features, key) for key in (STATE, ACTION))
        self.state_names, self.action_names = (axis_names(features[key]) for key in (STATE, ACTION))
        table = self._read_episodes()
        chosen = _as_indices("episodes", episodes, len(table["length"]))
        is_unique = len(set(chosen.tolist())) == len(chosen) > 0
        _expect(is_unique, f"episodes is {episodes!r}, expected one or more indices, each once.", "None reads all.")
        self._read_frames(table, chosen)
        self._cache = None if cache_dir is False else _cache_folder(cache_dir, self.root)
        self._open_images(table, chosen)
        self.resize_images(None)

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]  # negative indices count from the end, others outside are an IndexError
        return {
            "images": [self.image(i, key) for key in self.image_keys],
            "text": self.text(i),
            "state": self.states[i].copy(),
            "actions": self._chunks(np.array([i]))[0],
        }

    def resize_images(self, resizer: Resizer | None) -> None:
        """From now on return images at another size, the policy's, which is also the one that the cache keeps.

        Args:
            resizer: Makes uint8 `(side, side, 3)` of uint8 `(H, W, 3)`. Its `repr` has to say all that its results
                depend on, since cached images are found by it. None returns images as recorded.

        Raises:
            ValueError: It makes anything but 8-bit RGB images.
        """
        self._reader = FrameReader(list(self._clips.values()), self._cache, resizer, self._cache_every)

    def image(self, i: int, key: str | None = None) -> np.ndarray:
        """The frame of one camera, the first by default: uint8 `(H, W, 3)`."""
        file, start, _ = self._clips[key or self.image_keys[0], self.episode_index[i]]
        return self._reader.read(file, start + int(self.frame_index[i]))

    def vectors(self, name: str) -> np.ndarray:
        """Another feature of the frames, such as `observation.environment_state`: `(N, dim)` float32."""
        return self._read_columns({name: _vector_dim(self.info["features"], name)})[name].astype(np.float32)

    def _read_episodes(self) -> dict[str, np.ndarray]:
        """The columns of the episodes table that locate rows and images, in order of the episodes."""
        folder = self.root / "meta/episodes"
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for key in filter(self._is_video, self.image_keys):
            columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        paths = sorted(folder.glob("chunk-*/file-*.parquet"))
        _expect(paths, f"{folder} has no chunk-*/file-*.parquet, the table of episodes.")
        tables = [_read_numbers(path, dict.fromkeys(columns, 1)) for path in paths]
        table = {name: np.concatenate([table[name] for table in tables])[:, 0] for name in columns}
        order = np.argsort(table["episode_index"], kind="stable")
        kinds = {name: np.float64 if name.endswith("timestamp") else np.int64 for name in columns}
        table = {name: table[name][order].astype(kind) for name, kind in kinds.items()}
        _expect(
            np.array_equal(table["episode_index"], np.arange(len(order))) and (table["length"] > 0).all(),
            f"{folder} lists {len(order)} episodes, expected 0 to {len(order) - 1}, each once and not empty.",
        )
        for name, total in (("total_episodes", len(order)), ("total_frames", table["length"].sum())):
            value = f"{name} in {self.root / INFO} is {self.info.get(name)!r}"
            _expect(self.info.get(name) == total, f"{value}, expected {total} by the lengths in {folder}.")
        return table

    def _read_frames(self, table: dict[str, np.ndarray], chosen: np.ndarray) -> None:
        """Read the chosen episodes' rows in `data/`, and check them."""
        lengths = table["length"]
        self._paths, starts, n_rows = self._locate(table)
        self._n_rows = {path: n_rows[path] for path in _existing_files([self._paths[e] for e in chosen])}
        offsets = dict(zip(self._n_rows, np.cumsum([0, *self._n_rows.values()]), strict=False))
        first_rows = [offsets[self._paths[e]] + starts[e] for e in chosen]
        self.episode_index = np.repeat(chosen, lengths[chosen])
        self.frame_index = np.concatenate([np.arange(length) for length in lengths[chosen]])
        self._rows = np.repeat(first_rows, lengths[chosen]) + self.frame_index
        self.episode_end = np.repeat(np.cumsum(lengths[chosen]) - 1, lengths[chosen])

        widths = {STATE: self.state_dim, ACTION: self.action_dim}
        widths |= dict.fromkeys(("task_index", "episode_index", "frame_index"), 1)
        if "timestamp" in self.info["features"]:
            widths["timestamp"] = 1
        columns = self._read_columns(widths)
        indices = np.hstack([columns["episode_index"], columns["frame_index"]])
        is_same = (indices == np.stack([self.episode_index, self.frame_index], axis=1)).all(axis=1)
        self._check_frames("[episode, frame]", indices, is_same, "the same, by the lengths in meta/episodes.")
        seconds = columns.get("timestamp", self.frame_index[:, None] / self.fps)
        is_near = np.abs(seconds[:, 0] * self.fps - self.frame_index) < 0.5  # False for NaN
        self._check_frames("timestamp", seconds, is_near, f"frame / fps, with the fps {self.fps} in {INFO}.")
        self.states, self.actions = (columns[key].astype(np.float32) for key in (STATE, ACTION))
        for key, values in ((STATE, self.states), (ACTION, self.actions)):
            is_finite = np.isfinite(values).all(axis=1)
            self._check_frames(key, values, is_finite, "finite numbers.", "Leave out the episode, with `episodes`.")
        self._texts = _read_texts(self.root / "meta/tasks.parquet", columns["task_index"][:, 0].tolist())
        self.tasks = list(dict.fromkeys(self._texts))

    def _read_columns(self, widths: dict[str, int]) -> dict[str, np.ndarray]:
        """Columns of the chosen frames: `(N, width)` each."""
        parts = []
        for path, expected in self._n_rows.items():
            part = _read_numbers(path, widths)
            n_rows = len(part[next(iter(widths))])
            _expect(n_rows == expected, f"{path} has {n_rows} rows, expected {expected} as in meta/episodes.")
            parts.append(part)
        return {name: np.concatenate([part[name] for part in parts])[self._rows] for name in widths}

    def _check_frames(
        self, name: str, values: np.ndarray, is_valid: np.ndarray, expected: str, fix: str = AGAIN
    ) -> None:
        """Refuse the first frame that is not valid."""
        i = is_valid.argmin()
        episode, frame, value = self.episode_index[i], self.frame_index[i], values[i].tolist()
        position = f"in episode {episode}, frame {frame} of {self._paths[episode]}"
        _expect(is_valid[i], f"{name} is {value} {position}, expected {expected}", fix)

    def _open_images(self, table: dict[str, np.ndarray], chosen: np.ndarray) -> None:
        """Open the files of the chosen episodes' images."""
        self._clips = {}  # (file, index of the first frame, length) by image key and episode
        self.image_sizes = {}
        for key in self.image_keys:
            paths, starts, n_frames = self._locate(table, key)
            fps = self.fps if self._is_video(key) else None
            needed = _existing_files([paths[e] for e in chosen])
            files = {path: ImageFile(path, key, n_frames[path], fps) for path in needed}
            size = self.image_sizes[key] = files[needed[0]].size
            for path in needed:
                other = files[path].size
                _expect(other == size, f"Images of {key!r} are {other} in {path} and {size} in {needed[0]}.")
            for e in chosen.tolist():
                self._clips[key, e] = files[paths[e]], int(starts[e]), int(table["length"][e])

    def _locate(
        self, table: dict[str, np.ndarray], key: str | None = None
    ) -> tuple[list[Path], np.ndarray, dict[Path, int]]:
        """The file of each episode, the index of its first frame there, and the number of frames of each file.

        The files are those of the image feature `key`, or those of `data/` by default.
        """
        paths = self._files(table, key if key is not None and self._is_video(key) else None)
        starts, n_frames = np.zeros(len(paths), np.int64), dict.fromkeys(paths, 0)
        seconds = table.get(f"videos/{key}/from_timestamp")  # rows in parquet have none: they are in order
        for e in range(len(paths)) if seconds is None else np.argsort(seconds, kind="stable"):
            starts[e] = n_frames[paths[e]]
            n_frames[paths[e]] += int(table["length"][e])
            _expect(
                seconds is None or np.rint(seconds[e] * self.fps) == starts[e],
                f"videos/{key}/from_timestamp of episode {e} does not fit the lengths of the episodes before it in "
                f"{paths[e]}, expected {starts[e] / self.fps} s at the fps in meta/info.json.",
            )
        return paths, starts, n_frames

    def _files(self, table: dict[str, np.ndarray], video_key: str | None) -> list[Path]:
        """Each episode's file in `data/`, or its video of one camera."""
        name, default, prefix = "data_path", DATA_PATH, "data"
        if video_key is not None:
            name, default, prefix = "video_path", VIDEO_PATH, f"videos/{video_key}"
        template = self.info.get(name, default)
        n_videos = len(list(filter(self._is_video, self.image_keys)))
        _expect(
            video_key is None or n_videos == 1 or "{video_key" in str(template),
            f"{name} in {self.root / INFO} is {template!r}, one file for {n_videos} cameras, expected {{video_key}} "
            f"in it, such as {default!r}.",
        )
        what = f"{name} in {self.root / INFO} is {template!r}, which"
        with as_value_error(what, f"Expected a path such as {default!r}. {AGAIN}"):
            chunks, files = (table[f"{prefix}/{column}"].tolist() for column in ("chunk_index", "file_index"))
            return [
                self.root / template.format(video_key=video_key, chunk_index=chunk, file_index=file)
                for chunk, file in zip(chunks, files, strict=True)
            ]

    def _is_video(self, key: str) -> bool:
        return self.info["features"][key]["dtype"] == "video"


class JoinedChunkDatasets(_ChunkedFrames, torch.utils.data.ConcatDataset):
    """Several [`LeRobotChunkDataset`] as one, with all attributes that training reads.

    Raises:
        ValueError: The data sets differ in the control rate, the dimensions of states or actions, the cameras, the
            image sizes or the chunks.
    """

    def __init__(self, datasets: Sequence[LeRobotChunkDataset]):
        datasets = list(datasets)
        _expect(datasets, "datasets is empty, expected at least one LeRobotChunkDataset.", "Pass one.")
        super().__init__(datasets)
        for name in SHARED:
            setattr(self, name, _shared_value(name, datasets))
        for name in ("states", "actions", "frame_index"):
            setattr(self, name, np.concatenate([getattr(dataset, name) for dataset in datasets]))
        num_frames, num_episodes, episode_end, episode_index = 0, 0, [], []
        for dataset in datasets:
            episode_end.append(num_frames + dataset.episode_end)
            episode_index.append(num_episodes + dataset.episode_index)
            num_frames += len(dataset)
            num_episodes += dataset.info["total_episodes"]
        self.episode_end, self.episode_index = np.concatenate(episode_end), np.concatenate(episode_index)
        self._texts = [text for dataset in datasets for text in dataset._texts]
        self.tasks = list(dict.fromkeys(self._texts))

    def resize_images(self, resizer: Resizer | None) -> None:
        """See [`LeRobotChunkDataset.resize_images`]."""
        for dataset in self.datasets:
            dataset.resize_images(resizer)


def _shared_value(name: str, datasets: list[LeRobotChunkDataset]) -> Any:
    """The value of an attribute, which has to be the same wherever it is not None."""
    first, *others = [dataset for dataset in datasets if getattr(dataset, name) is not None] or datasets
    for other in others:
        value, other_value = getattr(first, name), getattr(other, name)
        message = f"{name} is {value} in {first.root} and {other_value} in {other.root}, expected the same."
        _expect(value == other_value, message, "Join data sets of one robot, read with the same arguments.")
    return getattr(first, name)


def _expect(holds: object, message: str, fix: str = AGAIN) -> None:
    if not holds:
        raise ValueError(f"{message} {fix}")


def _as_indices(name: str, values: Sequence[int] | None, size: int) -> np.ndarray:
    """`(n,)` int64, all by default."""
    indices = np.arange(size) if values is None else np.asarray(values)
    is_index = indices.ndim == 1 and (indices.dtype.kind in "iu" or not indices.size)  # an empty list has floats
    is_valid = is_index and (indices >= 0).all() and (indices < size).all()
    _expect(is_valid, f"{name} is {values!r}, expected indices up to {size - 1}.", "None stands for all.")
    return indices.astype(np.int64)


def _existing_files(paths: list[Path]) -> list[Path]:
    """These files, each once."""
    for path in (paths := list(dict.fromkeys(paths))):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, where {INFO} and meta/episodes locate chosen episodes. Download it, or choose "
                "other `episodes`."
            )
    return paths


def axis_names(feature: dict) -> list[str] | None:
    """The names of a vector's dimensions. LeRobot writes a list, or a dictionary of lists or of indices."""
    names = feature.get("names")
    if isinstance(names, dict):
        groups = names.values()
        if all(isinstance(group, int) for group in groups):
            names = sorted(names, key=names.get)
        else:
            names = [name for group in groups for name in (group if isinstance(group, list) else [group])]
    names = list(map(str, names)) if isinstance(names, list) else []
    return names if len(set(names)) == len(names) == feature["shape"][0] else None


def _choose_image_keys(image_keys: Sequence[str] | None, features: dict) -> list[str]:
    cameras = [key for key, feature in features.items() if feature.get("dtype") in ("video", "image")]
    depth = [key for key in cameras if is_depth(features[key])]
    known = [key for key in cameras if key not in depth]
    chosen = known if image_keys is None else list(image_keys)
    reason = f", but {depth} are depth maps (is_depth_map in {INFO}) and cannot be read" if depth else ""
    _expect(
        chosen and all(key in known for key in chosen) and len(set(chosen)) == len(chosen),
        f"image_keys is {image_keys!r}{reason}, expected a list of RGB cameras, each once.",
        f"This data set has {known}.",
    )
    return chosen


def is_depth(feature: dict) -> bool:
    """Whether a current or an earlier release of LeRobot marked a feature as depth maps."""
    for entry in (feature, feature.get("info"), feature.get("video_info")):
        if isinstance(entry, dict) and (entry.get("is_depth_map") or entry.get("video.is_depth_map")):
            return True
    return False


def _vector_dim(features: dict, key: str) -> int:
    shape = features.get(key, {}).get("shape")
    _expect(
        isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and shape[0] > 0,
        f"Feature {key!r} in meta/info.json has the shape {shape}, expected [dim], a flat vector.",
        f"This data set has {list(features)}: rename the right one.",
    )
    return shape[0]


def read_info(root: Path) -> dict:
    """`meta/info.json` of a data set, its version, control rate, features and number of episodes checked.

    Raises:
        ValueError: It describes another format, or is damaged.
        OSError: It is missing or unreadable.
    """
    _expect(root.is_dir(), f"root is {root}, which is not a folder.", "Pass a data set's, or use `download_dataset`.")
    path = root / INFO
    info = read_json(path, f"Pass the folder of a LeRobot v3.0 data set. {AGAIN}")
    version, features = info.get("codebase_version"), info.get("features")
    _expect(
        isinstance(version, str) and re.fullmatch(r"v3(\.\d+)+", version),
        f"codebase_version in {path} is {version!r}, expected 'v3.0'.",
        CONVERT if version == "v2.1" else AGAIN,
    )
    if version != "v3.0":
        logger.warning(f"codebase_version in {path} is {version}. This reader supports v3.0, and reads it as such.")
    check_fps(info.get("fps"), f"fps in {path}")
    check_whole(info.get("total_episodes"), f"total_episodes in {path}")
    is_described = isinstance(features, dict) and all(isinstance(feature, dict) for feature in features.values())
    _expect(is_described, f"features in {path} is {features!r}, expected a JSON object for each feature.")
    return info


def _read_numbers(path: Path, widths: dict[str, int]) -> dict[str, np.ndarray]:
    """Columns of a file as `(rows, width)`. For a width of 1, numbers may be plain or in lists."""
    with as_value_error(path, AGAIN), pq.ParquetFile(path) as file:
        table = file.read(columns=list(widths))
    numbers = {}
    for name, width in widths.items():
        _expect(name in table.column_names, f"{path} has no column {name!r}, only {table.column_names}.")
        column, sizes = table[name], [1]
        if isinstance(column.type, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
            sizes, column = pc.unique(pc.list_value_length(column)).to_pylist(), pc.list_flatten(column)
        values = column.to_numpy()
        _expect(
            set(sizes) <= {width} and values.dtype.kind in "iuf" and not column.null_count,
            f"Column {name!r} of {path} is {table[name].type} of lengths {sizes}, expected {width} numbers a row "
            "and no gaps, as in meta/info.json.",
        )
        numbers[name] = values.reshape(-1, width)
    return numbers


def _read_texts(path: Path, task_index: list[int]) -> list[str]:
    with as_value_error(path, AGAIN):
        table = pq.read_table(path).to_pydict()
        name = "task" if "task" in table else "__index_level_0__"  # pandas's name of an unnamed index
        tasks = dict(zip(table["task_index"], table[name], strict=True))
        if len(tasks) < len(table["task_index"]):
            raise ValueError(f"task_index is {table['task_index']}, expected each index once")
        texts = [tasks[index] for index in task_index]
    for task in tasks.values():
        _expect(isinstance(task, str), f"{path} has the task {task!r}, expected a text.")
    return texts


def _cache_folder(cache_dir: str | Path | None, root: Path) -> Path:
    _expect(cache_dir is not True, "cache_dir is True, expected a folder.", "None is the default one, False is none.")
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "smolandfast"
    folder = Path(cache_dir or default).expanduser()
    is_inside = folder.resolve().is_relative_to(root.resolve())
    _expect(not is_inside, f"cache_dir is {folder}, inside the data set, which is only read.", "Choose another.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cache_dir is {folder}, which cannot be created: {error.strerror}. Choose another.") from error
    return folder
