"""Read a LeRobot v3.0 data set as (images, task, state, action chunk) samples.

The layout is the one of the Hub's `lerobot/*` data sets: `meta/` holds JSON and the episodes table, `data/` the
low-dimensional frames as parquet, `videos/` a stream a camera with many episodes one after the other in each mp4.
Seeking in such a stream for every sample is slow, so each file is decoded once, into a uint8 `.npy` file in a cache.
"""

import bisect
import contextlib
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import httpx  # httpx2 since release 2.0
from PIL import Image
from transformers.utils import logging

from ..checks_smolandfast import as_rgb_images, as_value_error, check_whole
from ..files_smolandfast import atomic_write, read_json
from ..normalization_smolandfast import ACTION, STATE

logger = logging.get_logger(__name__)

AGAIN = "Download or convert the data set again."
INFO = "meta/info.json"
# LeRobot's defaults of the two templates in meta/info.json.
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


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
            "Check its name and the network, or pass the folder of a local copy with `--dataset_root`."
        ) from error


class LeRobotChunkDataset(torch.utils.data.Dataset):
    """Every frame of the chosen episodes, each with the `chunk_size` actions that start at it.

    A sample is `{"images": [uint8 (H, W, 3), one per image key], "text": the task, "state": float32 (state_dim,),
    "actions": float32 (chunk_size, action_dim)}`, in the robot's units.

    A chunk never crosses its episode's end: past the end, the episode's last action is repeated. For position targets
    this means "hold", which is what the robot did when the recording stopped. Zeros would send it to the origin, and
    leaving short chunks out would leave the end of the task unlearnt. For velocities it means "keep moving": there,
    choose a `chunk_size` that is short beside the episodes.

    Args:
        root: Folder of the data set. It is only read. Only the files of the chosen episodes need to be there.
        chunk_size: Actions in a chunk, at least 1.
        episodes: Indices of the episodes to read, in the order wanted; all by default.
        image_keys: Features to read as images, in the order wanted; all of dtype `video` or `image` by default, except
            depth maps, which are not read.
        frame_stride: Frames from one action of a chunk to the next. With 2, a policy that executes an action every
            1 / fps seconds moves at twice the demonstrated speed.
        cache_dir: Where decoded frames are kept; `smolandfast` in `$XDG_CACHE_HOME` or `~/.cache` by default. It may
            be deleted at any time. A file whose path, size or modification time changed is decoded again.

    Attributes:
        info: `meta/info.json`.
        image_keys, state_dim, action_dim, fps: What a sample looks like.
        state_names, action_names: Names of the dimensions; None where the data set has none.
        image_sizes: Height and width of each camera's images, by image key.
        states, actions: `(N, state_dim)` and `(N, action_dim)` float32 of the chosen frames.
        tasks: The sentences of the chosen frames, each once.
        episode_index, frame_index: `(N,)`, the episode of each frame and its place there.

    Raises:
        ValueError: An argument or the content of a file is wrong.
        OSError: A file is missing or unreadable, or the cache cannot be written.
    """

    def __init__(
        self,
        root: str | Path,
        chunk_size: int,
        episodes: Sequence[int] | None = None,
        image_keys: Sequence[str] | None = None,
        cache_dir: str | Path | None = None,
        frame_stride: int = 1,
    ):
        check_whole(chunk_size, "chunk_size")
        check_whole(frame_stride, "frame_stride")
        self.root = Path(root).expanduser()
        self.chunk_size, self.frame_stride = int(chunk_size), int(frame_stride)
        self._offsets = np.arange(self.chunk_size) * self.frame_stride  # in frames: (chunk_size,)
        self.info = _read_info(self.root)
        self.fps = self.info["fps"]
        features = self.info["features"]
        self.image_keys = _choose_image_keys(image_keys, features)
        self.state_dim, self.action_dim = (_vector_dim(features, key) for key in (STATE, ACTION))
        self.state_names, self.action_names = (_axis_names(features[key]) for key in (STATE, ACTION))

        table = self._read_episodes()
        chosen = _choose_episodes(episodes, len(table["length"]))
        self._read_rows(table, chosen)
        folder = _cache_folder(cache_dir, self.root)
        self._clips = {}  # (length, H, W, 3) frames by image key and episode
        self.image_sizes = {}
        for key in self.image_keys:
            paths, starts, n_frames = self._locate_images(key, table)
            fps = self.fps if self._is_video(key) else None
            needed = self._check_there([paths[e] for e in chosen])
            frames = {path: _open_frames(path, key, n_frames[path], fps, folder) for path in needed}
            size = self.image_sizes[key] = frames[needed[0]].shape[1:3]
            for path in needed:
                _expect(
                    frames[path].shape[1:3] == size,
                    f"Images of {key!r} are {frames[path].shape[1:3]} in {path} and {size} in {needed[0]} (height, "
                    f"width), expected one size. {AGAIN}",
                )
            for e in chosen.tolist():
                self._clips[key, e] = frames[paths[e]][starts[e] : starts[e] + table["length"][e]]

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]  # negative indices count from the end, others outside are an IndexError
        return {
            "images": [self.image(i, key) for key in self.image_keys],
            "text": self.text(i),
            "state": self.states[i].copy(),
            "actions": self.actions[np.minimum(i + self._offsets, self._last[i])],
        }

    def text(self, i: int) -> str:
        """A frame's task."""
        return self._texts[i]

    def image(self, i: int, key: str | None = None) -> np.ndarray:
        """One camera's frame, by default the first's: uint8 `(H, W, 3)`."""
        return np.array(self._clips[key or self.image_keys[0], self.episode_index[i]][self.frame_index[i]])

    def action_chunks(self, indices: Sequence[int] | None = None) -> np.ndarray:
        """The chunks of these samples, of all by default: `(n, chunk_size, action_dim)` float32."""
        chosen = _choose_samples(indices, len(self))
        rows = chosen[:, None] + self._offsets  # (n, chunk_size)
        return self.actions[np.minimum(rows, self._last[chosen, None])]

    def vectors(self, name: str) -> np.ndarray:
        """Another feature of the frames, such as `observation.environment_state`: `(N, dim)` float32."""
        width = _vector_dim(self.info["features"], name)
        parts = [_read_numbers(path, {name: width})[name] for path in self._data_paths]
        return np.concatenate(parts)[self._rows].astype(np.float32)

    def _read_episodes(self) -> dict[str, np.ndarray]:
        """The columns of the episodes table that locate rows and images, in order of the episodes."""
        folder = self.root / "meta/episodes"
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for key in filter(self._is_video, self.image_keys):
            columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        paths = sorted(folder.glob("chunk-*/file-*.parquet"))
        _expect(paths, f"{folder} has no chunk-*/file-*.parquet, the table of episodes. {AGAIN}")
        tables = [_read_numbers(path, dict.fromkeys(columns, 1)) for path in paths]
        table = {name: np.concatenate([table[name] for table in tables]) for name in columns}
        order = np.argsort(table["episode_index"][:, 0], kind="stable")
        kinds = {name: np.float64 if name.endswith("timestamp") else np.int64 for name in columns}
        table = {name: table[name][order, 0].astype(kind) for name, kind in kinds.items()}
        _expect(
            np.array_equal(table["episode_index"], np.arange(len(order))) and (table["length"] > 0).all(),
            f"{folder} lists {len(order)} episodes, expected 0 to {len(order) - 1}, each once and not empty. {AGAIN}",
        )
        for name, found in (("total_episodes", len(order)), ("total_frames", table["length"].sum())):
            _expect(
                self.info[name] == found,
                f"{name} in {self.root / INFO} is {self.info[name]}, but it is {found} by the lengths in {folder}, "
                f"expected the same. {AGAIN}",
            )
        return table

    def _read_rows(self, table: dict[str, np.ndarray], chosen: np.ndarray) -> None:
        """Read the chosen episodes' files in `data/`, check them and keep the chosen rows."""
        folder, lengths, paths = self.root / "data", table["length"], self._files(table)
        self._data_paths = self._check_there([paths[e] for e in chosen])
        members = {path: [] for path in self._data_paths}  # the episodes of each file, one after the other
        for e, path in enumerate(paths):
            if path in members:
                members[path].append(e)
        parts = [self._read_file(path, np.array(episodes), lengths) for path, episodes in members.items()]
        data = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        read = np.concatenate(list(members.values()))
        first = np.zeros(len(lengths), np.int64)  # the row where each episode starts
        first[read] = np.cumsum(lengths[read]) - lengths[read]
        rows = np.concatenate([np.arange(first[e], first[e] + lengths[e]) for e in chosen])
        self._rows = rows
        self.episode_index, self.frame_index = (data[name][rows, 0] for name in ("episode_index", "frame_index"))
        self.states, self.actions = (data[key][rows].astype(np.float32) for key in (STATE, ACTION))
        for key, values in ((STATE, self.states), (ACTION, self.actions)):
            i = (~np.isfinite(values)).any(axis=1).argmax()
            _expect(
                np.isfinite(values[i]).all(),
                f"{key} is {values[i].tolist()} in episode {self.episode_index[i]}, frame {self.frame_index[i]} of "
                f"{folder}, expected finite numbers. Repair it, or leave the episode out with `episodes`.",
            )
        self._last = np.repeat(np.cumsum(lengths[chosen]) - 1, lengths[chosen])  # (N,) where its episode ends
        self._texts = _read_texts(self.root / "meta/tasks.parquet", data["task_index"][rows, 0].tolist())
        self.tasks = list(dict.fromkeys(self._texts))

    def _read_file(self, path: Path, episodes: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """The columns of a file in `data/`, which has these episodes."""
        widths = {STATE: self.state_dim, ACTION: self.action_dim, "task_index": 1}
        widths |= {"episode_index": 1, "frame_index": 1}
        if "timestamp" in self.info["features"]:
            widths["timestamp"] = 1
        data = _read_numbers(path, widths)
        n_rows, lengths = len(data["task_index"]), lengths[episodes]
        _expect(
            n_rows == lengths.sum(),
            f"{path} has {n_rows} rows, expected {lengths.sum()} by the lengths in meta/episodes. {AGAIN}",
        )
        frames = np.arange(n_rows) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        expected = np.stack([np.repeat(episodes, lengths), frames], axis=1)  # (rows, 2)
        found = np.hstack([data["episode_index"], data["frame_index"]])
        row = (found != expected).any(axis=1).argmax()  # the first that differs, if any
        _expect(
            (found[row] == expected[row]).all(),
            f"Row {row} of {path} is [episode, frame] {found[row].tolist()}, expected {expected[row].tolist()} by "
            f"the lengths in meta/episodes. {AGAIN}",
        )
        seconds = data.pop("timestamp", frames[:, None] / self.fps)[:, 0]
        is_off = ~(np.abs(seconds * self.fps - frames) < 0.5)  # so that NaN is off
        _expect(
            not is_off.any(),
            f"timestamp is {seconds[is_off.argmax()]} in row {is_off.argmax()} of {path}, frame "
            f"{frames[is_off.argmax()]} of its episode, which does not fit the fps {self.fps} in {self.root / INFO}. "
            f"Correct the fps, or {AGAIN[0].lower()}{AGAIN[1:]}",
        )
        return data | {"episode_index": expected[:, :1], "frame_index": expected[:, 1:]}

    def _locate_images(self, key: str, table: dict[str, np.ndarray]) -> tuple[list[Path], np.ndarray, dict[Path, int]]:
        """The file of each episode, the index of its first frame there, and the number of frames of each file."""
        paths = self._files(table, key if self._is_video(key) else None)
        starts, n_frames = np.zeros(len(paths), np.int64), dict.fromkeys(paths, 0)
        seconds = table.get(f"videos/{key}/from_timestamp")  # images in parquet have none: they lie row by row
        for e in range(len(paths)) if seconds is None else np.argsort(seconds, kind="stable"):
            starts[e] = n_frames[paths[e]]
            n_frames[paths[e]] += int(table["length"][e])
            _expect(
                seconds is None or np.rint(seconds[e] * self.fps) == starts[e],
                f"videos/{key}/from_timestamp of episode {e} does not fit the lengths of the episodes before it in "
                f"{paths[e]}, expected {starts[e] / self.fps} s at the fps in meta/info.json. {AGAIN}",
            )
        return paths, starts, n_frames

    def _files(self, table: dict[str, np.ndarray], video_key: str | None = None) -> list[Path]:
        """The file of each episode: its rows', or that of a camera's video."""
        if video_key is None:
            name, default, prefix, fields = "data_path", DATA_PATH, "data", {}
        else:
            name, default, prefix = "video_path", VIDEO_PATH, f"videos/{video_key}"
            fields = {"video_key": video_key}
        template = self.info.get(name, default)
        n_videos = len(list(filter(self._is_video, self.image_keys)))
        _expect(
            video_key is None or n_videos == 1 or "{video_key" in str(template),
            f"{name} in {self.root / INFO} is {template!r}, one file for {n_videos} cameras, expected {{video_key}} "
            f"in it, such as {default!r}. {AGAIN}",
        )
        what = f"{name} in {self.root / INFO} is {template!r}, which"
        with as_value_error(what, f"Expected a path such as {default!r}. {AGAIN}"):
            indices = zip(table[f"{prefix}/chunk_index"], table[f"{prefix}/file_index"], strict=True)
            fill = template.format
            return [self.root / fill(**fields, chunk_index=int(c), file_index=int(f)) for c, f in indices]

    def _check_there(self, paths: list[Path]) -> list[Path]:
        """These files, each once."""
        for path in (paths := list(dict.fromkeys(paths))):
            if not os.path.isfile(path):
                raise FileNotFoundError(
                    f"{path} is missing, where {INFO} and meta/episodes locate chosen episodes. Download it, or "
                    "choose other `episodes`."
                )
        return paths

    def _is_video(self, key: str) -> bool:
        return self.info["features"][key]["dtype"] == "video"


class JoinedChunkDatasets(torch.utils.data.ConcatDataset):
    """Several data sets as one, with all that training asks a [`LeRobotChunkDataset`] for.

    Raises:
        ValueError: The data sets are not of one kind: they differ in the control rate, the dimensions of states or
            actions, the cameras, the image sizes or the chunks.
    """

    def __init__(self, datasets: Sequence[LeRobotChunkDataset]):
        datasets = list(datasets)
        _expect(datasets, "datasets is empty, expected at least one LeRobotChunkDataset.")
        super().__init__(datasets)
        for one, other in itertools.combinations(datasets, 2):
            _check_same_kind(one, other)
        first = datasets[0]
        self.image_keys, self.image_sizes, self.fps = first.image_keys, first.image_sizes, first.fps
        self.state_dim, self.action_dim = first.state_dim, first.action_dim
        self.state_names = next((d.state_names for d in datasets if d.state_names is not None), None)
        self.action_names = next((d.action_names for d in datasets if d.action_names is not None), None)
        self.chunk_size, self.frame_stride = first.chunk_size, first.frame_stride
        self.states = np.concatenate([dataset.states for dataset in datasets])
        self.frame_index = np.concatenate([dataset.frame_index for dataset in datasets])
        firsts = np.cumsum([0, *(dataset.info["total_episodes"] for dataset in datasets)])
        numbers = [start + dataset.episode_index for start, dataset in zip(firsts, datasets, strict=False)]
        self.episode_index = np.concatenate(numbers)
        self.tasks = list(dict.fromkeys(task for dataset in datasets for task in dataset.tasks))

    def text(self, i: int) -> str:
        """A frame's task."""
        i = range(len(self))[i]
        number = bisect.bisect_right(self.cumulative_sizes, i)
        return self.datasets[number].text(i - (self.cumulative_sizes[number - 1] if number else 0))

    def action_chunks(self, indices: Sequence[int] | None = None) -> np.ndarray:
        """The chunks of these samples, of all by default: `(n, chunk_size, action_dim)` float32."""
        chosen = _choose_samples(indices, len(self))
        chunks = np.empty((len(chosen), self.chunk_size, self.action_dim), np.float32)
        for dataset, end in zip(self.datasets, self.cumulative_sizes, strict=True):
            start = end - len(dataset)
            is_here = (start <= chosen) & (chosen < end)
            chunks[is_here] = dataset.action_chunks(chosen[is_here] - start)
        return chunks


def _check_same_kind(first: LeRobotChunkDataset, other: LeRobotChunkDataset) -> None:
    fields = ["fps", "state_dim", "action_dim", "image_keys", "image_sizes", "chunk_size", "frame_stride"]
    values = {name: (getattr(first, name), getattr(other, name)) for name in fields}
    for name in ("state_names", "action_names"):
        names = getattr(first, name), getattr(other, name)
        if None not in names:
            values[name] = names
    for name, (mine, theirs) in values.items():
        _expect(
            mine == theirs,
            f"{name} is {mine} in {first.root} and {theirs} in {other.root}, expected the same. Join only data sets "
            "of one robot, read with the same arguments.",
        )


def _axis_names(feature: dict) -> list[str] | None:
    """The names of a vector's dimensions. LeRobot writes a list, or a dictionary of lists or of positions."""
    names = feature.get("names")
    if isinstance(names, dict):
        is_position = all(type(value) is int for value in names.values())
        if is_position and len(set(names.values())) < len(names):
            return None
        groups = [group if isinstance(group, list) else [group] for group in names.values()]
        names = sorted(names, key=names.get) if is_position else sum(groups, [])
    is_named = isinstance(names, list) and [len(names)] == feature["shape"] and len(set(map(str, names))) == len(names)
    return list(map(str, names)) if is_named else None


def _expect(holds: object, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _choose_episodes(episodes: Sequence[int] | None, n_episodes: int) -> np.ndarray:
    chosen = np.arange(n_episodes) if episodes is None else np.asarray(episodes)
    is_index = chosen.ndim == 1 and chosen.size > 0 and chosen.dtype.kind in "iu"
    _expect(
        is_index and len(set(chosen.tolist())) == chosen.size and chosen.min() >= 0 and chosen.max() < n_episodes,
        f"episodes is {episodes!r}, expected one or more indices up to {n_episodes - 1}, each once, or None for all.",
    )
    return chosen


def _choose_samples(indices: Sequence[int] | None, n_samples: int) -> np.ndarray:
    rows = np.arange(n_samples) if indices is None else np.asarray(indices)
    rows = rows if rows.size else rows.astype(np.int64)  # an empty list has the dtype float64
    is_index = rows.ndim == 1 and rows.dtype.kind in "iu"
    _expect(
        is_index and (rows >= 0).all() and (rows < n_samples).all(),
        f"indices is {indices!r}, expected indices of samples up to {n_samples - 1}, or None for all.",
    )
    return rows.astype(np.int64)


def _choose_image_keys(image_keys: Sequence[str] | None, features: dict) -> list[str]:
    cameras = [key for key, feature in features.items() if feature.get("dtype") in ("video", "image")]
    depth = [key for key in cameras if _is_depth(features[key])]
    known = [key for key in cameras if key not in depth]
    _expect(
        not isinstance(image_keys, (str, bytes)),
        f"image_keys is {image_keys!r}, expected a list of features, such as [{image_keys!r}].",
    )
    _expect(
        known or not depth,
        f"All cameras of this data set, {depth}, are depth maps (is_depth_map in {INFO}), expected an RGB camera.",
    )
    chosen = known if image_keys is None else list(image_keys)
    _expect(
        not set(chosen) & set(depth),
        f"image_keys is {image_keys!r}, and {depth} are depth maps (is_depth_map in {INFO}), expected RGB images. "
        f"Choose of {known}.",
    )
    _expect(
        chosen and len(set(chosen)) == len(chosen) and set(chosen) <= set(known),
        f"image_keys is {image_keys!r}, expected one or more, each once, of this data set's {known}.",
    )
    return chosen


def _is_depth(feature: dict) -> bool:
    """Whether LeRobot marks a feature as depth maps, today or in earlier releases."""
    places = (feature, feature.get("info"), feature.get("video_info"))
    marks = ("is_depth_map", "video.is_depth_map")
    return any(isinstance(place, dict) and any(place.get(mark) for mark in marks) for place in places)


def _vector_dim(features: dict, key: str) -> int:
    shape = features.get(key, {}).get("shape")
    _expect(
        isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and shape[0] > 0,
        f"Feature {key!r} in meta/info.json has the shape {shape}, expected [dim], a flat vector. This data set has "
        f"{list(features)}: rename the feature that is meant.",
    )
    return shape[0]


def _read_info(root: Path) -> dict:
    _expect(root.is_dir(), f"root is {root}, which is no folder. Pass a data set's, or use `download_dataset`.")
    path = root / INFO
    info = read_json(path, f"Pass the folder of a LeRobot v3.0 data set. {AGAIN}")
    version, features = info.get("codebase_version"), info.get("features")
    _expect(
        isinstance(version, str) and re.fullmatch(r"v3(\.\d+)+", version),
        f"codebase_version in {path} is {version!r}, expected 'v3.0'. Convert an older data set with LeRobot's "
        "converter (convert_dataset_v21_to_v30), and read a newer one with a newer release.",
    )
    if version != "v3.0":
        logger.warning(f"codebase_version in {path} is {version}. This reader supports v3.0, and reads it as such.")
    for name in ("fps", "total_frames", "total_episodes"):
        number = info.get(name)
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < float("inf")
        _expect(is_number, f"{name} in {path} is {number!r}, expected a number above 0. {AGAIN}")
    is_described = isinstance(features, dict) and all(isinstance(feature, dict) for feature in features.values())
    _expect(is_described, f"features in {path} is {features!r}, expected a JSON object for each feature. {AGAIN}")
    return info


def _read_numbers(path: Path, widths: dict[str, int]) -> dict[str, np.ndarray]:
    """Columns of a file as `(rows, width)`. Where the width is 1, plain numbers do as well as lists of one."""
    with as_value_error(path, AGAIN), pq.ParquetFile(path) as file:
        table = file.read(columns=list(widths))
    numbers = {}
    for name, width in widths.items():
        _expect(name in table.column_names, f"{path} has no column {name!r}, only {table.column_names}. {AGAIN}")
        column, sizes = table[name], [1]
        if isinstance(column.type, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
            sizes, column = pc.unique(pc.list_value_length(column)).to_pylist(), pc.list_flatten(column)
        values = column.to_numpy()
        _expect(
            set(sizes) <= {width} and values.dtype.kind in "iuf" and not column.null_count,
            f"Column {name!r} of {path} is {table[name].type} of lengths {sizes}, expected {width} numbers a row "
            f"and no gaps, as meta/info.json says. {AGAIN}",
        )
        numbers[name] = values.reshape(-1, width)
    return numbers


def _read_texts(path: Path, task_index: list[int]) -> list[str]:
    with as_value_error(path, AGAIN):
        table = pq.read_table(path).to_pydict()
        name = "task" if "task" in table else "__index_level_0__"  # what pandas calls an index without a name
        tasks = dict(zip(table["task_index"], table[name], strict=True))
        if len(tasks) < len(table["task_index"]):
            raise ValueError(f"task_index is {table['task_index']}, expected each index once")
        texts = [tasks[index] for index in task_index]
    wrong = [text for text in texts if not isinstance(text, str)]
    _expect(not wrong, f"{path} has the task {wrong[:1]}, expected a sentence. {AGAIN}")
    return texts


def _cache_folder(cache_dir: str | Path | None, root: Path) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "smolandfast"
    folder = Path(cache_dir or default).expanduser()
    is_inside = folder.resolve().is_relative_to(root.resolve())
    _expect(not is_inside, f"cache_dir is {folder}, inside the data set, which is only read. Choose another.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cache_dir is {folder}, which cannot be made: {error.strerror}. Choose another.") from error
    return folder


def _open_frames(path: Path, key: str, n_frames: int, fps: float | None, folder: Path) -> np.memmap:
    """The frames of a file, `(n_frames, H, W, 3)` uint8, decoded into a `.npy` file in `folder` unless it is there.

    The file is a video of this `fps`, or, where it is None, a parquet file.
    """
    stat = path.stat()
    fingerprint = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{key}|{fps}"
    target = folder / f"{key.replace('/', '_')}-{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        frames = np.load(target, mmap_mode="r")  # refuses a file that was cut off
        if len(frames) == n_frames:
            return frames
    no_room = as_value_error(folder, "Choose a cache_dir that can be written and has room.", passing=(ValueError,))
    with no_room, atomic_write(target) as unfinished, open(unfinished, "wb") as file:
        count, shape = 0, None
        for frame in _decode_frames(path, key, fps):
            if shape is None:
                shape = frame.shape
                header = {"descr": "|u1", "fortran_order": False, "shape": (n_frames, *shape)}
                np.lib.format.write_array_header_1_0(file, header)
            _expect(frame.shape == shape, f"Frame {count} of {path} is {frame.shape}, expected {shape}. {AGAIN}")
            file.write(frame.tobytes())
            count += 1
        _expect(
            count == n_frames,
            f"{path} has {count} frames, expected {n_frames} by the lengths in meta/episodes. {AGAIN}",
        )
    return np.load(target, mmap_mode="r")


def _decode_frames(path: Path, key: str, fps: float | None) -> Iterator[np.ndarray]:
    """The frames of a video, or of the image column `key` of a parquet file, as uint8 `(H, W, 3)`."""
    with as_value_error(path, AGAIN):
        if fps is not None:
            with av.open(str(path)) as video:
                for i, frame in enumerate(video.decode(video=0)):
                    _check_frame(frame, i, fps)
                    yield frame.to_ndarray(format="rgb24")
        else:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(64, columns=[key]):
                    for image in batch.column(key).to_pylist():
                        yield as_rgb_images(Image.open(io.BytesIO(image["bytes"])), key)[0]


def _check_frame(frame: av.VideoFrame, i: int, fps: float) -> None:
    """Refuse a frame that is not the camera's `i`-th RGB image."""
    if frame.is_corrupt:
        raise ValueError(f"the frame at {frame.time} s is damaged")
    if frame.time is None or not abs(frame.time * fps - i) < 0.5:
        raise ValueError(f"frame {i} is at {frame.time} s, expected {i / fps} s at the fps {fps} in {INFO}")
    channels = frame.format.components
    if len(channels) == 1 and channels[0].bits > 8:
        raise ValueError(f"its pixels are {frame.format.name}, a depth map's, expected RGB images of 8 bits")
