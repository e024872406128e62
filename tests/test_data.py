"""The LeRobot v3.0 reader, on a tiny data set written here and, where it is at hand, on the real PushT one."""

import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from unittest.mock import Mock, patch

import av
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import warnings_of
from huggingface_hub.utils import httpx
from lerobot_writer import write_dataset
from PIL import Image

from smolandfast.training import JoinedChunkDatasets, LeRobotChunkDataset, data, download_dataset, frames

ROLLOUTS = Path(__file__).parent / "data/pusht_rollouts"
FPS, LENGTHS = 10, [5, 7, 4]
EPISODE = np.repeat(np.arange(3), LENGTHS)  # (16,)
FRAME = np.concatenate([np.arange(n) for n in LENGTHS])
STATES = np.stack([EPISODE, FRAME], axis=1).astype(np.float32)
ACTIONS = np.stack([EPISODE, FRAME, 100 * EPISODE + FRAME], axis=1).astype(np.float32)
TASKS = ["push", "pull"]
# Each frame is one shade of grey, so that an image says which frame it is. Cameras split their videos differently.
SHADES = {"observation.image.front": 40 + 12 * np.arange(16), "observation.image.wrist": 230 - 12 * np.arange(16)}
VIDEO_FILES = {"observation.image.front": [0, 0, 1], "observation.image.wrist": [0, 0, 0]}
DATA_FILES = [0, 1, 1]
FRONT = "videos/observation.image.front/chunk-000/file-000.mp4"
SECOND = "videos/observation.image.front/chunk-000/file-001.mp4"
WRIST = "videos/observation.image.wrist/chunk-000/file-000.mp4"
INFO, DATA, EPISODES = "meta/info.json", "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"


def write_video(path: Path, shades: np.ndarray, size: int = 32, fps: int = FPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = size
        for shade in shades:
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_depth_video(root: Path) -> None:
    """As LeRobot encodes depth maps: 12 bits, one channel."""
    with av.open(str(root / FRONT), "w") as container:
        stream = container.add_stream("ffv1", rate=FPS, pix_fmt="gray12le")
        stream.width = stream.height = 32
        for i in range(12):
            depth = np.full((32, 32), 300 * i, np.uint16)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(depth, format="gray12le")))
        container.mux(stream.encode())


def write_table(path: Path, columns: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def edit_table(path: Path, **columns) -> None:
    """Replace columns of a table, or drop those that are None."""
    table = pq.read_table(path).to_pydict() | columns
    pq.write_table(pa.table({name: column for name, column in table.items() if column is not None}), path)


def edit_info(root: Path, **fields) -> None:
    (root / INFO).write_text(json.dumps(json.loads((root / INFO).read_text()) | fields))


def edit_features(root: Path, **features) -> None:
    edit_info(root, features=json.loads((root / INFO).read_text())["features"] | features)


def describe_timestamps(root: Path) -> None:
    edit_table(root / DATA.replace("000.parquet", "001.parquet"), timestamp=FRAME[LENGTHS[0] :] / FPS)
    edit_features(root, timestamp={"dtype": "float32", "shape": [1]})


def write_images(root: Path, key: str, encode: Callable[[int], bytes]) -> None:
    """Store a camera in parquet: `encode` makes the file of each frame."""
    for file in (0, 1):
        frames = np.flatnonzero(np.array(DATA_FILES)[EPISODE] == file)
        images = [{"bytes": encode(i), "path": "frame.png"} for i in frames]
        edit_table(root / f"data/chunk-000/file-{file:03d}.parquet", **{key: images})
    edit_features(root, **{key: {"dtype": "image", "shape": [32, 32, 3]}})
    shutil.rmtree(root / "videos" / key)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    image.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.fixture(scope="module")
def tiny_source(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("source") / "tiny"
    features = {key: {"dtype": "video", "shape": [32, 32, 3]} for key in SHADES}
    features |= {"observation.state": {"dtype": "float32", "shape": [2]}, "action": {"dtype": "float32", "shape": [3]}}
    info = {"codebase_version": "v3.0", "fps": FPS, "total_frames": 16, "total_episodes": 3, "features": features}
    episodes = {
        "episode_index": [0, 1, 2],
        "length": LENGTHS,
        "data/chunk_index": [0] * 3,
        "data/file_index": DATA_FILES,
    }
    for key, shades in SHADES.items():
        files = np.array(VIDEO_FILES[key])
        for file in set(VIDEO_FILES[key]):
            write_video(root / f"videos/{key}/chunk-000/file-{file:03d}.mp4", shades[files[EPISODE] == file])
        starts = [
            sum(n for n, other in zip(LENGTHS[:e], files[:e], strict=True) if other == files[e]) for e in range(3)
        ]
        episodes |= {f"videos/{key}/chunk_index": [0] * 3, f"videos/{key}/file_index": files}
        episodes[f"videos/{key}/from_timestamp"] = np.array(starts) / FPS
    write_table(root / EPISODES, episodes)
    for file in set(DATA_FILES):
        rows = np.array(DATA_FILES)[EPISODE] == file
        columns = {"observation.state": list(STATES[rows]), "action": list(ACTIONS[rows])}
        columns |= {"episode_index": EPISODE[rows], "frame_index": FRAME[rows], "task_index": EPISODE[rows] % 2}
        write_table(root / f"data/chunk-000/file-{file:03d}.parquet", columns)
    write_table(root / "meta/tasks.parquet", {"task_index": [0, 1], "task": TASKS})
    (root / INFO).write_text(json.dumps(info))
    stats = {"observation.state": STATES, "action": ACTIONS}
    stats = {key: {"min": v.min(0).tolist(), "max": v.max(0).tolist(), "count": [16]} for key, v in stats.items()}
    (root / "meta/stats.json").write_text(json.dumps(stats))
    return root


@pytest.fixture
def tiny(tiny_source, tmp_path) -> Path:
    return shutil.copytree(tiny_source, tmp_path / "tiny")


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def shades_of(dataset: LeRobotChunkDataset, camera: int) -> np.ndarray:
    return np.array([dataset[i]["images"][camera].mean() for i in range(len(dataset))])


def test_data_sets_are_joined_with_their_episodes_apart():
    parts = [LeRobotChunkDataset(ROLLOUTS, 4, episodes) for episodes in ([0], [0, 1])]
    joined = JoinedChunkDatasets(parts)
    assert len(joined) == len(parts[0]) + len(parts[1]) and joined.tasks == parts[0].tasks
    assert len(np.flatnonzero(np.diff(joined.episode_index))) == 2  # three episodes
    assert joined.action_chunks().shape == (len(joined), 4, 2)
    for i in (0, len(parts[0]) - 1, len(parts[0]), len(joined) - 1):
        part, j = (parts[0], i) if i < len(parts[0]) else (parts[1], i - len(parts[0]))
        assert joined.text(i) == part.text(j) and joined.frame_index[i] == part.frame_index[j]
        np.testing.assert_array_equal(joined[i]["actions"], part[j]["actions"])
        np.testing.assert_array_equal(joined.states[i], part.states[j])


@pytest.mark.parametrize("number", [0, 2])
def test_chunks_of_chosen_samples_are_those_of_the_samples(number, tiny, cache):
    dataset = LeRobotChunkDataset(tiny, 4, [2, 0], cache_dir=cache)
    dataset = JoinedChunkDatasets([dataset] * number) if number else dataset
    chosen = np.random.default_rng(0).permutation(len(dataset))[:5]
    for indices in (chosen, chosen.tolist()):
        expected = [dataset[i]["actions"] for i in chosen]
        np.testing.assert_array_equal(dataset.action_chunks(indices), expected)
    assert dataset.action_chunks([]).shape == (0, 4, 3)
    np.testing.assert_array_equal(dataset.action_chunks(), [dataset[i]["actions"] for i in range(len(dataset))])
    for wrong in ([0, len(dataset)], [-1], [0.5], [[0]], [True] * len(dataset)):
        with pytest.raises(ValueError, match=r"indices is .*, expected indices up to"):
            dataset.action_chunks(wrong)


def test_a_negative_index_reads_the_task_of_the_same_frame(tiny, cache):
    joined = JoinedChunkDatasets([LeRobotChunkDataset(tiny, 4, [e], cache_dir=cache) for e in (0, 1)])
    assert (
        [joined.text(i) for i in (-1, -8, 0)] == [joined[i]["text"] for i in (-1, -8, 0)] == ["pull", "push", "push"]
    )
    with pytest.raises(IndexError):
        joined.text(12)


def name_axes(root: Path, *names) -> None:
    edit_features(root, action={"dtype": "float32", "shape": [3], "names": list(names)})


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (None, {"chunk_size": 5}, ["chunk_size is 4", "and 5"]),
        (None, {"frame_stride": 2}, ["frame_stride is 1", "and 2"]),
        (None, {"image_keys": [*SHADES][:1]}, ["image_keys", *SHADES]),
        (None, {"image_keys": [*SHADES][::-1]}, ["image_keys", *SHADES]),
        (lambda r: change_rate(r, 20), {}, ["fps is 10", "and 20"]),
        (lambda r: narrow(r, "action", 3), {}, ["action_dim is 3", "and 2"]),
        (lambda r: narrow(r, "observation.state", 2), {}, ["state_dim is 2", "and 1"]),
        (lambda r: rewrite_videos(r, size=16), {}, ["image_sizes", "(32, 32)", "(16, 16)"]),
        (lambda r: name_axes(r, "y", "x", "z"), {}, ["action_names", "'x', 'y', 'z'", "'y', 'x', 'z'"]),
    ],
    ids=["chunk", "stride", "cameras", "camera_order", "fps", "action", "state", "sizes", "names"],
)
def test_data_sets_of_different_kinds_are_not_joined(change, arguments, words, tiny, tmp_path, cache):
    name_axes(tiny, "x", "y", "z")
    other = shutil.copytree(tiny, tmp_path / "other")
    if change:
        change(other)
    parts = [LeRobotChunkDataset(tiny, 4, cache_dir=cache)]
    parts.append(LeRobotChunkDataset(other, **{"chunk_size": 4, "cache_dir": cache} | arguments))
    with pytest.raises(ValueError) as error:
        JoinedChunkDatasets(parts)
    assert [word for word in [*words, str(tiny), str(other)] if word not in str(error.value)] == []


@pytest.mark.parametrize("names", [None, {"motors": ["x", "y", "z"]}, {"z": 2, "x": 0, "y": 1}, ["x", "y", "z"]])
def test_names_are_compared_where_both_data_sets_have_them(names, tiny, tmp_path, cache):
    name_axes(tiny, "x", "y", "z")
    other = shutil.copytree(tiny, tmp_path / "other")
    edit_features(other, action={"dtype": "float32", "shape": [3], "names": names})
    assert len(JoinedChunkDatasets([LeRobotChunkDataset(root, 4, cache_dir=cache) for root in (tiny, other)])) == 32


def test_joined_data_sets_have_the_names_of_the_first_that_has_any(tiny, tmp_path, cache):
    other, third = (shutil.copytree(tiny, tmp_path / name) for name in ("other", "third"))
    edit_features(other, action={"dtype": "float32", "shape": [3], "names": {"z": 2, "x": 0, "y": 1}})
    parts = [LeRobotChunkDataset(root, 4, cache_dir=cache) for root in (tiny, other)]
    joined = JoinedChunkDatasets(parts)
    assert joined.action_names == ["x", "y", "z"] and joined.state_names == parts[0].state_names
    name_axes(third, "y", "x", "z")  # is compared with the second's too
    with pytest.raises(ValueError, match="action_names"):
        JoinedChunkDatasets([*parts, LeRobotChunkDataset(third, 4, cache_dir=cache)])


def test_no_data_set_cannot_be_joined():
    with pytest.raises(ValueError, match="datasets is empty"):
        JoinedChunkDatasets([])


def test_a_sample_has_the_documented_fields(tiny, cache):
    dataset = LeRobotChunkDataset(tiny, chunk_size=4, cache_dir=cache)
    assert (len(dataset), dataset.state_dim, dataset.action_dim, dataset.fps) == (16, 2, 3, FPS)
    assert dataset.image_keys == list(SHADES)
    sample = dataset[6]
    assert set(sample) == {"images", "text", "state", "actions"}
    assert [(image.shape, image.dtype) for image in sample["images"]] == [((32, 32, 3), np.uint8)] * 2
    assert sample["text"] == "pull"
    assert sample["state"].dtype == sample["actions"].dtype == np.float32
    np.testing.assert_array_equal(sample["state"], STATES[6])
    np.testing.assert_array_equal(sample["actions"], ACTIONS[6:10])
    np.testing.assert_array_equal(dataset[-1]["state"], STATES[-1])
    with pytest.raises(IndexError):
        dataset[16]


def test_a_stride_takes_every_nth_action_and_holds_the_last_past_the_episodes_end(tiny, cache):
    dataset = LeRobotChunkDataset(tiny, 3, cache_dir=cache, frame_stride=2)
    np.testing.assert_array_equal(dataset[5]["actions"], ACTIONS[[5, 7, 9]])  # an episode of frames 5 to 11
    np.testing.assert_array_equal(dataset[9]["actions"], ACTIONS[[9, 11, 11]])
    np.testing.assert_array_equal(dataset.action_chunks()[9], dataset[9]["actions"])
    with pytest.raises(ValueError, match="frame_stride is 0"):
        LeRobotChunkDataset(tiny, 3, cache_dir=cache, frame_stride=0)


def test_arrays_are_those_of_the_files(tiny, cache):
    dataset = LeRobotChunkDataset(tiny, chunk_size=4, cache_dir=cache)
    for found, expected in (
        (dataset.states, STATES),
        (dataset.actions, ACTIONS),
        (dataset.episode_index, EPISODE),
        (dataset.frame_index, FRAME),
    ):
        np.testing.assert_array_equal(found, expected)


def test_every_image_belongs_to_its_frame_in_every_camera(tiny, cache):
    dataset = LeRobotChunkDataset(tiny, chunk_size=1, cache_dir=cache)
    for camera, shades in enumerate(SHADES.values()):
        np.testing.assert_allclose(shades_of(dataset, camera), shades, atol=4)


def test_chunks_never_cross_an_episodes_end(tiny, cache):
    dataset = LeRobotChunkDataset(tiny, chunk_size=6, cache_dir=cache)
    chunks = dataset.action_chunks()
    assert chunks.shape == (16, 6, 3) and chunks.dtype == np.float32
    for i, chunk in enumerate(chunks):
        frames = np.minimum(FRAME[i] + np.arange(6), LENGTHS[EPISODE[i]] - 1)  # the last action is held
        np.testing.assert_array_equal(chunk[:, 0], EPISODE[i])
        np.testing.assert_array_equal(chunk[:, 1], frames)
        np.testing.assert_array_equal(dataset[i]["actions"], chunk)


def test_episodes_are_read_in_the_order_asked_for(tiny, cache):
    dataset = LeRobotChunkDataset(tiny, chunk_size=3, episodes=[2, 0], cache_dir=cache)
    rows = np.r_[12:16, 0:5]
    np.testing.assert_array_equal(dataset.states, STATES[rows])
    np.testing.assert_array_equal(dataset.action_chunks()[3], ACTIONS[[15, 15, 15]])
    np.testing.assert_allclose(shades_of(dataset, 0), SHADES["observation.image.front"][rows], atol=4)
    assert [dataset[0]["text"], dataset[8]["text"]] == ["push", "push"]


def test_image_keys_choose_and_order_the_cameras(tiny, cache):
    dataset = LeRobotChunkDataset(tiny, 1, image_keys=["observation.image.wrist"], cache_dir=cache)
    np.testing.assert_allclose(shades_of(dataset, 0), SHADES["observation.image.wrist"], atol=4)
    both = LeRobotChunkDataset(tiny, 1, image_keys=list(SHADES)[::-1], cache_dir=cache)
    np.testing.assert_allclose(shades_of(both, 1), SHADES["observation.image.front"], atol=4)


def test_images_stored_in_parquet_read_like_videos(tiny, cache):
    key = "observation.image.front"
    write_images(tiny, key, lambda i: encoded(Image.new("RGB", (32, 32), (SHADES[key][i],) * 3)))
    dataset = LeRobotChunkDataset(tiny, 1, cache_dir=cache)
    np.testing.assert_array_equal(shades_of(dataset, 0), SHADES[key])
    np.testing.assert_array_equal(
        shades_of(LeRobotChunkDataset(tiny, 1, [2, 1], cache_dir=cache), 0)[:4], SHADES[key][12:]
    )


@pytest.mark.parametrize("place", ["info", "video_info", None])
@pytest.mark.parametrize("mark", ["is_depth_map", "video.is_depth_map"])
def test_depth_maps_are_not_read_as_cameras(place, mark, tiny, cache):
    front, wrist = SHADES
    feature = {"dtype": "video", "shape": [32, 32, 1]}
    edit_features(tiny, **{wrist: feature | ({place: {mark: True}} if place else {mark: True})})
    assert LeRobotChunkDataset(tiny, 1, cache_dir=cache).image_keys == [front]
    with pytest.raises(ValueError, match=f"image_keys is .*{wrist}.* depth maps .*{front}"):
        LeRobotChunkDataset(tiny, 1, image_keys=[front, wrist], cache_dir=cache)
    edit_features(tiny, **{wrist: feature | {"info": {mark: False}}})
    assert LeRobotChunkDataset(tiny, 1, cache_dir=cache).image_keys == [front, wrist]


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF"), (np.float32, "TIFF")]
)
def test_images_of_more_than_eight_bits_are_refused(dtype, kind, tiny, cache):
    key = "observation.image.front"
    depth = np.arange(32 * 32).reshape(32, 32).astype(dtype)
    write_images(tiny, key, lambda i: encoded(Image.fromarray(depth), kind))
    with pytest.raises(ValueError, match=rf"{DATA}.*{key}"):
        LeRobotChunkDataset(tiny, 1, cache_dir=cache)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_other_eight_bit_modes_are_read_as_rgb(mode, tiny, cache):
    key = "observation.image.front"
    write_images(tiny, key, lambda i: encoded(Image.new("RGB", (32, 32), (SHADES[key][i],) * 3).convert(mode)))
    dataset = LeRobotChunkDataset(tiny, 1, cache_dir=cache)
    np.testing.assert_allclose(shades_of(dataset, 0), SHADES[key], atol=30 if mode == "P" else 0)


def test_only_the_files_of_chosen_episodes_are_needed(tiny, cache):
    whole = [list(LeRobotChunkDataset(tiny, 3, [e], cache_dir=False)) for e in (0, 2)]
    (tiny / "data/chunk-000/file-001.parquet").rename(tiny / "file-001.parquet")
    (tiny / SECOND).rename(tiny / "file-001.mp4")
    first = list(LeRobotChunkDataset(tiny, 3, [0], cache_dir=cache))
    with pytest.raises(FileNotFoundError, match=r"file-001.parquet is missing.*`episodes`"):
        LeRobotChunkDataset(tiny, 3, [0, 2], cache_dir=cache)
    (tiny / "file-001.parquet").rename(tiny / "data/chunk-000/file-001.parquet")
    with pytest.raises(FileNotFoundError, match=r"file-001.mp4 is missing.*`episodes`"):
        LeRobotChunkDataset(tiny, 3, [2], cache_dir=cache)
    (tiny / "file-001.mp4").rename(tiny / SECOND)
    (tiny / DATA).unlink()
    (tiny / FRONT).unlink()
    second = LeRobotChunkDataset(tiny, 3, [2], cache_dir=cache)
    for found, expected in zip((first, second), whole, strict=True):
        for sample, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(sample["images"], other["images"])
            np.testing.assert_array_equal(sample["actions"], other["actions"])
            np.testing.assert_array_equal(sample["state"], other["state"])
    np.testing.assert_array_equal(second.vectors("action"), second.actions)


def test_files_are_where_info_says(tiny, cache):
    (tiny / "rows").mkdir()
    for file in (0, 1):
        (tiny / f"data/chunk-000/file-{file:03d}.parquet").rename(tiny / f"rows/0-{file}.rows")
    for path in list(tiny.rglob("*.mp4")):
        folder = tiny / "films/chunk-000" / path.parts[-3]
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / f"{path.stem}.mov")
    video_path = "films/chunk-{chunk_index:03d}/{video_key}/file-{file_index:03d}.mov"
    edit_info(tiny, data_path="rows/{chunk_index}-{file_index}.rows", video_path=video_path)
    dataset = LeRobotChunkDataset(tiny, 1, cache_dir=cache)
    np.testing.assert_array_equal(dataset.actions, ACTIONS)
    for camera, shades in enumerate(SHADES.values()):
        np.testing.assert_allclose(shades_of(dataset, camera), shades, atol=4)


def test_a_newer_version_3_is_tried_with_a_warning(tiny, cache):
    for version, is_known in (("v3.0", True), ("v3.1", False), ("v3.12", False)):
        edit_info(tiny, codebase_version=version)
        with warnings_of(data) as messages:
            assert len(LeRobotChunkDataset(tiny, 1, cache_dir=cache)) == 16
        assert len(messages) == (not is_known) and all(version in message for message in messages)


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v4.0", "v30.0", "v3", "3", "v3.x", 3.0, None])
def test_other_versions_are_refused(version, tiny, cache):
    edit_info(tiny, codebase_version=version)
    with pytest.raises(ValueError, match="codebase_version in .*info.json is .*'v3.0'"):
        LeRobotChunkDataset(tiny, 1, cache_dir=cache)


def test_links_are_followed_as_in_the_hubs_cache(tiny, tmp_path, cache):
    """There, a snapshot is a tree of links to files without endings."""
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate([path for path in tiny.rglob("*") if path.is_file()]):
        path.rename(tmp_path / f"blobs/{i}")
        path.symlink_to(tmp_path / f"blobs/{i}")
    (tiny / "meta/episodes/chunk-000").rename(tmp_path / "chunk")
    (tiny / "meta/episodes/chunk-000").symlink_to(tmp_path / "chunk")
    (tmp_path / "link").symlink_to(tiny)
    for root in (tiny, tmp_path / "link"):
        dataset = LeRobotChunkDataset(root, 1, cache_dir=cache)
        np.testing.assert_array_equal(dataset.actions, ACTIONS)
        np.testing.assert_allclose(shades_of(dataset, 1), SHADES["observation.image.wrist"], atol=4)
    assert len(list(cache.iterdir())) == 3  # two videos of the front camera, one of the wrist's
    (tmp_path / "blobs/0").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="missing|cannot be read"):
        LeRobotChunkDataset(tiny, 1, cache_dir=cache)


def test_sentences_without_a_column_name_are_found(tiny, cache):
    write_table(tiny / "meta/tasks.parquet", {"task_index": [1, 0], "__index_level_0__": TASKS[::-1]})
    assert LeRobotChunkDataset(tiny, 1, cache_dir=cache)[6]["text"] == "pull"


@pytest.fixture
def no_decoding(monkeypatch):
    def forbid():
        monkeypatch.setattr(frames.ImageFile, "decode", lambda file, *_: pytest.fail(f"{file.path} is decoded again"))

    return forbid


def test_frames_are_decoded_once_and_never_into_the_data_set(tiny, cache, no_decoding):
    cache.mkdir()
    (cache / "observation.image.front-0123456789abcdef.npy").write_text("of an earlier release")
    before = sorted((path, path.stat().st_mtime_ns) for path in [*tiny.rglob("*"), *cache.iterdir()])
    first = [sample["images"] for sample in LeRobotChunkDataset(tiny, 1, cache_dir=cache)]
    no_decoding()
    again = LeRobotChunkDataset(tiny, 2, episodes=[1], cache_dir=cache)
    np.testing.assert_array_equal([sample["images"] for sample in again], first[5:12])
    paths = [*tiny.rglob("*"), *cache.glob("*.npy")]
    assert sorted((path, path.stat().st_mtime_ns) for path in paths) == before


def test_the_cache_is_under_xdg_cache_home_by_default(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    dataset = LeRobotChunkDataset(tiny, 1)
    dataset[0], dataset[15]
    assert len(list((tmp_path / "xdg/smolandfast").iterdir())) == 3
    shutil.rmtree(tmp_path / "xdg")
    LeRobotChunkDataset(tiny, 1, cache_dir=False)[0]
    assert not (tmp_path / "xdg").exists()


def test_a_changed_video_is_decoded_again(tiny, cache):
    shades_of(LeRobotChunkDataset(tiny, 1, cache_dir=cache), 1)
    write_video(tiny / WRIST, SHADES["observation.image.front"])
    os.utime(tiny / WRIST, (1, 1))
    dataset = LeRobotChunkDataset(tiny, 1, cache_dir=cache)
    np.testing.assert_allclose(shades_of(dataset, 1), SHADES["observation.image.front"], atol=4)


def flip_bytes(path: Path) -> None:
    """In each slot of an image of 32 by 32 pixels."""
    content = bytearray(path.read_bytes())
    for position in range(100, len(content), 32 * 32 * 3 + 4):
        content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_bytes, truncate, Path.unlink, lambda path: shutil.rmtree(path.parent, True)])
def test_a_cache_that_is_damaged_during_use_is_written_again(damage, tiny, cache, no_decoding):
    dataset = LeRobotChunkDataset(tiny, 1, cache_dir=cache)
    expected = [sample["images"] for sample in dataset]
    for path in cache.iterdir():
        damage(path)
    for _ in range(2):
        np.testing.assert_array_equal([sample["images"] for sample in dataset], expected)
        no_decoding()


def test_a_full_disk_is_found_before_anything_is_written(tiny, cache, monkeypatch):
    dataset = LeRobotChunkDataset(tiny, 1, cache_dir=cache)
    needed = 2 * 16 * (32 * 32 * 3 + 4)
    log = Mock()
    monkeypatch.setattr(frames.logger, "log", log)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Mock(free=needed - 1))
    with pytest.raises(OSError, match=rf"need up to 9\.8\de-05 GB in {cache}.* GB free.*cache_dir=False"):
        dataset[0]
    assert not list(cache.iterdir()) and not log.called
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Mock(free=needed))
    shades_of(dataset, 0)
    assert log.call_count == 1 and str(cache) in log.call_args.args[1]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Mock(free=0))  # nothing more is needed
    shades_of(LeRobotChunkDataset(tiny, 1, cache_dir=cache), 0)


def test_only_every_nth_frame_of_an_episode_takes_room_in_the_cache(tiny, cache, monkeypatch, no_decoding):
    whole = LeRobotChunkDataset(tiny, 1, cache_dir=False)
    dataset = LeRobotChunkDataset(tiny, 1, cache_dir=cache, cache_every=3)
    expected, slot = sample_images(whole), 32 * 32 * 3 + 4
    needed = 2 * (2 + 3 + 2) * slot  # two cameras; of 5, 7 and 4 frames
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Mock(free=needed - 1))
    with pytest.raises(OSError, match="GB free"):
        dataset[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Mock(free=needed))
    np.testing.assert_array_equal(sample_images(dataset), expected)
    slots = [path.read_bytes()[i : i + slot] for path in cache.iterdir() for i in range(0, path.stat().st_size, slot)]
    assert sum(map(any, slots)) == needed // slot
    no_decoding()
    for i in (0, 3, 5, 8, 11, 12, 15):
        np.testing.assert_array_equal(dataset[i]["images"], expected[i])


def test_a_disk_that_is_full_later_is_a_clear_error(tiny, cache):
    dataset = LeRobotChunkDataset(tiny, 1, cache_dir=cache)
    dataset[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * 32 * 3 + 100, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cache_dir is {cache}.* cannot be written.*cache_dir=False"):
            dataset[1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    np.testing.assert_allclose(shades_of(dataset, 0), SHADES["observation.image.front"], atol=4)


@dataclass(frozen=True)
class Crop:
    side: int

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return image[: self.side, : self.side]


@dataclass(frozen=True)
class Grey:
    def __call__(self, image: np.ndarray) -> np.ndarray:
        return image[..., 0]


def sample_images(dataset: LeRobotChunkDataset) -> list[list[np.ndarray]]:
    return [dataset[i]["images"] for i in range(len(dataset))]


def test_images_are_returned_and_kept_at_the_size_of_the_resizer(tiny, cache, no_decoding):
    dataset = LeRobotChunkDataset(tiny, 1, cache_dir=cache)
    joined = JoinedChunkDatasets([dataset, LeRobotChunkDataset(tiny, 1, [1], cache_dir=cache)])
    whole = sample_images(joined)
    for side in (8, 16):
        joined.resize_images(Crop(side))
        for _ in range(2):
            np.testing.assert_array_equal(sample_images(joined), np.array(whole)[:, :, :side, :side])
        assert joined.image_sizes == dataset.image_sizes == dict.fromkeys(SHADES, (32, 32))
        assert joined[0]["images"][0].flags.writeable
    no_decoding()
    for resizer, side in ((None, 32), (Crop(8), 8)):
        joined.resize_images(resizer)
        np.testing.assert_array_equal(sample_images(joined), np.array(whole)[:, :, :side, :side])
    with pytest.raises(ValueError, match=r"resizer Grey\(\) made uint8 \(32, 32\)"):
        dataset.resize_images(Grey())


def test_large_images_are_kept_only_once_they_are_resized(tiny, cache):
    rewrite_videos(tiny, size=160)  # 2 x 76,800 bytes
    dataset = LeRobotChunkDataset(tiny, 1, cache_dir=cache)
    whole = sample_images(dataset)
    assert not list(cache.iterdir())
    dataset.resize_images(Crop(64))
    np.testing.assert_array_equal(sample_images(dataset), np.array(whole)[:, :, :64, :64])
    assert sorted(path.stat().st_size // (64 * 64 * 3) for path in cache.iterdir()) == [4, 12, 16]
    single = LeRobotChunkDataset(tiny, 1, image_keys=[*SHADES][:1], cache_dir=cache)
    single[0]
    assert len(list(cache.iterdir())) == 4


VIDEOS = {  # frames a second, codec, its options
    "h264_b_frames": (30, "libx264", {}),
    "h264_gop_2": (10, "libx264", {"g": "2"}),
    "h264_gop_20_29.97": (29.97, "libx264", {"g": "20"}),
    "h264_open_gop": (30, "libx264", {"x264-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:scenecut=0"}),
    "h264_intra_refresh": (25, "libx264", {"x264-params": "keyint=30:intra-refresh=1"}),
    "hevc_open_gop": (30, "libx265", {"x265-params": "log-level=none:keyint=12:min-keyint=12:open-gop=1"}),
    "av1_gop_2": (25, "libsvtav1", {"g": "2", "preset": "12"}),
    "av1_gop_50": (30, "libsvtav1", {"g": "50", "preset": "12"}),
    "vp9": (10, "libvpx-vp9", {"g": "16", "cpu-used": "8", "lag-in-frames": "8"}),
    "mpeg4_b_frames": (30, "mpeg4", {"bf": "2"}),
}
EPISODE_LENGTHS = [9, 44, 1, 16]
SIZES = {"observation.image.front": (48, 64), "observation.image.wrist": (32, 32)}


def write_movie(path: Path, fps: float, codec: str, options: dict, size: tuple[int, int]) -> None:
    """70 frames that all differ: noise and a mark that move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(size[0]).integers(0, 256, (size[0] // 4, size[1] // 4, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        try:
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=options)
        except av.error.EncoderNotFoundError:
            pytest.skip(f"PyAV has no encoder {codec}")
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for i in range(sum(EPISODE_LENGTHS)):
            image = np.roll(noise.repeat(4, 0).repeat(4, 1), 3 * i, axis=1)
            image[5 * i % size[0] :][:8, :10] = 2 * i
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    if codec == "libsvtav1" and hasattr(os, "sched_setscheduler"):  # as root, it makes this thread a real-time one
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def write_movies(root: Path, tiny: Path, video: str) -> Path:
    """A data set of two cameras, each with one video of four episodes."""
    fps, codec, options = VIDEOS[video]
    shutil.copytree(tiny, root, ignore=shutil.ignore_patterns("videos", "file-001.parquet"))
    n = len(EPISODE_LENGTHS)
    episodes = {"episode_index": np.arange(n), "length": EPISODE_LENGTHS}
    episodes |= {f"data/{name}_index": [0] * n for name in ("chunk", "file")}
    for key, size in SIZES.items():
        write_movie(root / f"videos/{key}/chunk-000/file-000.mp4", fps, codec, options, size)
        episodes |= {f"videos/{key}/{name}_index": [0] * n for name in ("chunk", "file")}
        episodes[f"videos/{key}/from_timestamp"] = np.cumsum([0, *EPISODE_LENGTHS[:-1]]) / fps
    write_table(root / EPISODES, episodes)
    index = np.repeat(np.arange(n), EPISODE_LENGTHS)
    frame = np.concatenate([np.arange(length) for length in EPISODE_LENGTHS])
    rows = {"observation.state": list(np.zeros((70, 2))), "action": list(np.zeros((70, 3)))}
    write_table(root / DATA, rows | {"episode_index": index, "frame_index": frame, "task_index": 0 * index})
    edit_info(root, fps=fps, total_episodes=n, total_frames=70)
    return root


def decoded(path: Path) -> list[np.ndarray]:
    """All frames of a video, in sequence."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def assert_images_are(dataset: LeRobotChunkDataset, expected: list[list[np.ndarray]], indices) -> None:
    for i in indices:
        for image, other in zip(dataset[int(i)]["images"], expected[i], strict=True):
            np.testing.assert_array_equal(image, other)


@pytest.fixture
def movies(tiny, tmp_path):
    """A data set of a kind of video, and its frames by a sequential decode."""

    def build(video: str) -> tuple[Path, list[list[np.ndarray]]]:
        root = write_movies(tmp_path / video, tiny, video)
        videos = [decoded(root / path) for path in (FRONT, WRIST)]
        assert [image.shape[:2] for image, *_ in videos] == list(SIZES.values())
        assert [len(video) for video in videos] == [70, 70]
        return root, list(zip(*videos, strict=True))

    return build


@pytest.mark.parametrize("video", VIDEOS)
def test_any_order_reads_the_frames_of_a_sequential_decode(video, movies, cache, monkeypatch):
    root, expected = movies(video)
    random = np.random.default_rng(0).permutation(70)
    for order in (random, np.arange(70)[::-1], np.arange(70), np.arange(0, 70, 3), np.array([-1, 0, 69, 69])):
        assert_images_are(LeRobotChunkDataset(root, 1, cache_dir=False), expected, order)
    dataset = LeRobotChunkDataset(root, 1, cache_dir=cache)
    for _ in range(2):
        assert_images_are(dataset, expected, random)
    chosen = np.r_[54:70, 0:9]
    dataset = LeRobotChunkDataset(root, 1, [3, 0], cache_dir=False)
    assert_images_are(dataset, [expected[i] for i in chosen], np.random.default_rng(0).permutation(25))
    check = Mock(wraps=frames._check_frame)
    monkeypatch.setattr(frames, "_check_frame", check)
    assert_images_are(LeRobotChunkDataset(root, 1, cache_dir=False), expected, range(70))
    assert check.call_count <= 140 + 8  # each frame once; each camera's decoder may start at the keyframe before


@pytest.mark.parametrize("keeps_frames", [True, False])
def test_workers_read_the_same_frames(keeps_frames, movies, cache):
    """Forked ones; `test_training.py` spawns one too."""
    root, expected = movies("h264_b_frames")
    dataset = LeRobotChunkDataset(root, 1, cache_dir=cache if keeps_frames else False)
    assert_images_are(dataset, expected, [30])  # leaves a decoder open in this process
    loader = torch.utils.data.DataLoader(
        dataset, 8, sampler=[*range(69, -1, -1)], num_workers=2, collate_fn=list, multiprocessing_context="fork"
    )
    samples = [sample for batch in loader for sample in batch]
    for sample, images in zip(samples, expected[::-1], strict=True):
        for image, other in zip(sample["images"], images, strict=True):
            np.testing.assert_array_equal(image, other)
    assert_images_are(dataset, expected, [31, 2])


def read_with_new_decoders(dataset: LeRobotChunkDataset, expected: list) -> None:
    with patch.object(frames.av, "open", wraps=av.open) as opened:
        assert_images_are(dataset, expected, [31, 32])
    assert opened.call_count == 2


def test_a_forked_process_does_not_use_its_parents_decoders(movies):
    root, expected = movies("h264_gop_2")
    dataset = LeRobotChunkDataset(root, 1, cache_dir=False)
    read_with_new_decoders(dataset, expected)
    child = multiprocessing.get_context("fork").Process(target=read_with_new_decoders, args=(dataset, expected))
    child.start()
    child.join()
    assert child.exitcode == 0


def test_two_processes_fill_one_cache(movies, cache, no_decoding):
    root, expected = movies("h264_gop_20_29.97")
    dataset = LeRobotChunkDataset(root, 1, cache_dir=cache)
    orders = [np.random.default_rng(seed).permutation(70) for seed in (0, 1)]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=assert_images_are, args=(dataset, expected, order)) for order in orders]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    no_decoding()
    assert_images_are(dataset, expected, range(70))


def test_threads_and_pickled_copies_read_the_same_frames(movies):
    root, expected = movies("h264_gop_20_29.97")
    dataset = LeRobotChunkDataset(root, 1, cache_dir=False)
    assert_images_are(dataset, expected, [30])
    copy = pickle.loads(pickle.dumps(dataset))
    orders = [np.random.default_rng(seed).permutation(70) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda order: assert_images_are(copy, expected, order), orders))


def test_a_damaged_frame_is_named_when_it_is_asked_for(movies, cache):
    root, expected = movies("h264_gop_2")
    with av.open(str(root / FRONT)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][41]
        start, end = packet.pos + 4, packet.pos + packet.size
    content = bytearray((root / FRONT).read_bytes())
    content[start:end] = bytes(end - start)
    (root / FRONT).write_bytes(content)
    dataset = LeRobotChunkDataset(root, 1, cache_dir=cache)
    whole = [i for i in range(70) if i not in (40, 41)]  # the decoder may fail before it returns the frame before
    for order in (range(70), np.random.default_rng(0).permutation(70).tolist()):
        for i in order:
            if i == 41:
                with pytest.raises(ValueError, match=f"Frame 41 of {root / FRONT}"):
                    dataset[i]
            elif i in whole:
                assert_images_are(dataset, expected, [i])


@pytest.mark.parametrize("keeps_frames", [True, False])
def test_images_in_parquet_are_read_in_any_order_from_row_groups(keeps_frames, tiny, cache, monkeypatch):
    key = "observation.image.front"
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    write_images(tiny, key, lambda i: encoded(Image.fromarray(images[i])))
    for file in (0, 1):
        path = tiny / f"data/chunk-000/file-{file:03d}.parquet"
        pq.write_table(pq.read_table(path), path, row_group_size=3)
    read = Mock(wraps=frames.Image.open)
    monkeypatch.setattr(frames.Image, "open", read)
    dataset = LeRobotChunkDataset(tiny, 1, image_keys=[key], cache_dir=cache if keeps_frames else False)
    monkeypatch.setattr(frames._row_groups, "limit", 1)  # a byte: only the last group stays
    for order in (np.random.default_rng(0).permutation(16), range(15, -1, -1), range(16)):
        for i in order:
            np.testing.assert_array_equal(dataset[i]["images"][0], images[i])
    assert read.call_count == 2 + (16 if keeps_frames else 48)  # the first of each file is checked


def test_an_image_of_another_size_in_parquet_is_named(tiny, cache):
    key = "observation.image.front"
    write_images(tiny, key, lambda i: encoded(Image.new("RGB", (32, 32 if i != 3 else 48))))
    dataset = LeRobotChunkDataset(tiny, 1, cache_dir=cache)
    dataset[2]
    with pytest.raises(ValueError, match=rf"Frame 3 of .*{DATA}.*\(48, 32\).*\(32, 32\)"):
        dataset[3]


def test_a_sample_is_the_callers_own(tiny, cache):
    dataset = LeRobotChunkDataset(tiny, 1, cache_dir=cache)
    dataset[0]["images"][0][:] = 0
    np.testing.assert_allclose(shades_of(dataset, 0), SHADES["observation.image.front"], atol=4)


def nan_at_row_3(values: np.ndarray) -> list:
    values = values[:5].copy()
    values[3, 1] = np.nan
    return list(values)


def narrow(root: Path, key: str, dim: int) -> None:
    """Take the last dimension of a feature away."""
    for path in (root / "data").rglob("*.parquet"):
        edit_table(path, **{key: [row[: dim - 1] for row in pq.read_table(path).to_pydict()[key]]})
    edit_features(root, **{key: {"dtype": "float32", "shape": [dim - 1]}})


def rewrite_videos(root: Path, **options) -> None:
    for path in root.rglob("*.mp4"):
        with av.open(str(path)) as video:
            number = sum(1 for _ in video.decode(video=0))
        write_video(path, np.arange(number), **options)


def change_rate(root: Path, fps: int) -> None:
    rewrite_videos(root, fps=fps)
    for key in SHADES:
        name = f"videos/{key}/from_timestamp"
        edit_table(
            root / EPISODES, **{name: [t * FPS / fps for t in pq.read_table(root / EPISODES)[name].to_pylist()]}
        )
    edit_info(root, fps=fps)


BREAKS = {  # what is done to the data set: words that the error must have
    "root_missing": (shutil.rmtree, ["tiny", "download_dataset"]),
    "info_missing": (lambda r: (r / INFO).unlink(), ["info.json", "LeRobot v3.0"]),
    "info_cut_off": (lambda r: truncate(r / INFO), ["info.json", "again"]),
    "info_not_an_object": (lambda r: (r / INFO).write_text("[]"), ["info.json", "list"]),
    "version_2_1": (lambda r: edit_info(r, codebase_version="v2.1"), ["'v2.1'", "'v3.0'", "v21_to_v30"]),
    "fps_zero": (lambda r: edit_info(r, fps=0), ["fps", "info.json", "0"]),
    "features_missing": (lambda r: edit_info(r, features=None), ["features", "None"]),
    "no_action": (
        lambda r: edit_info(r, features={"observation.image.front": {"dtype": "video"}}),
        ["observation.state"],
    ),
    "no_image": (lambda r: edit_info(r, features={}), ["image_keys", "[]"]),
    "total_frames": (lambda r: edit_info(r, total_frames=17), ["16", "17", "total_frames"]),
    "episodes_missing": (lambda r: shutil.rmtree(r / "meta/episodes"), ["episodes"]),
    "episodes_cut_off": (lambda r: truncate(r / EPISODES), ["file-000.parquet", "again"]),
    "episode_missing": (lambda r: edit_table(r / EPISODES, episode_index=[0, 1, 3]), ["3 episodes", "0 to 2"]),
    "lengths_swapped": (lambda r: edit_table(r / EPISODES, length=[7, 5, 4]), [DATA, "5 rows", "7"]),
    "lengths_swapped_in_a_file": (
        lambda r: edit_table(r / EPISODES, length=[5, 4, 7]),
        ["file-001", "[1, 4]", "episode 2, frame 0"],
    ),
    "total_episodes_unknown": (lambda r: edit_info(r, total_episodes=None), ["total_episodes", "info.json is None"]),
    "total_episodes": (lambda r: edit_info(r, total_episodes=4), ["total_episodes", "info.json is 4", "3"]),
    "fps_of_another_recording": (
        lambda r: edit_table(r / DATA, timestamp=np.arange(5) / 30) or describe_timestamps(r),
        [DATA, "timestamp", "frame 1", "fps 10"],
    ),
    "timestamp_not_finite": (
        lambda r: edit_table(r / DATA, timestamp=[0, 0.1, np.nan, 0.3, 0.4]) or describe_timestamps(r),
        [DATA, "timestamp", "frame 2"],
    ),
    "data_path_of_version_2": (
        lambda r: edit_info(r, data_path="data/episode_{episode_index:06d}.parquet"),
        ["data_path", "info.json", "episode_index", "{file_index:03d}"],
    ),
    "data_path_to_no_file": (lambda r: edit_info(r, data_path="rows/{file_index}"), ["rows", "info.json", "episodes"]),
    "video_path_of_one_camera": (
        lambda r: edit_info(r, video_path=FRONT.replace("000.mp4", "{file_index:03d}.mp4")),
        ["video_path", "2 cameras", "{video_key}"],
    ),
    "video_path_missing": (lambda r: edit_info(r, video_path=None), ["video_path", "None", "{video_key}"]),
    "lengths_too_short": (lambda r: edit_table(r / EPISODES, length=[5, 6, 4]), ["15", "16", "lengths"]),
    "video_columns_missing": (
        lambda r: edit_table(r / EPISODES, **{"videos/observation.image.wrist/file_index": None}),
        ["videos/observation.image.wrist/file_index", "no column"],
    ),
    "timestamps_shifted": (
        lambda r: edit_table(r / EPISODES, **{"videos/observation.image.wrist/from_timestamp": [0.0, 0.6, 1.2]}),
        ["from_timestamp", "episode 1", "0.5 s"],
    ),
    "data_missing": (lambda r: (r / DATA).unlink(), [DATA]),
    "data_cut_off": (lambda r: truncate(r / DATA), [DATA, "again"]),
    "data_without_action": (lambda r: edit_table(r / DATA, action=None), [DATA, "'action'", "no column"]),
    "data_of_another_width": (lambda r: edit_table(r / DATA, action=[[1.0, 2.0]] * 5), [DATA, "[2]", "3 numbers"]),
    "data_with_a_gap": (lambda r: edit_table(r / DATA, action=[[1.0, 2.0, 3.0]] * 4 + [None]), [DATA, "None"]),
    "data_of_strings": (lambda r: edit_table(r / DATA, action=[["a", "b", "c"]] * 5), [DATA, "string"]),
    "action_not_finite": (
        lambda r: edit_table(r / DATA, action=nan_at_row_3(ACTIONS)),
        ["action", "episode 0, frame 3"],
    ),
    "state_not_finite": (
        lambda r: edit_table(r / DATA, **{"observation.state": nan_at_row_3(STATES)}),
        ["observation.state", "episode 0, frame 3"],
    ),
    "task_unknown": (
        lambda r: write_table(r / "meta/tasks.parquet", {"task_index": [0], "task": ["x"]}),
        ["tasks", "1"],
    ),
    "task_twice": (
        lambda r: write_table(r / "meta/tasks.parquet", {"task_index": [0, 1, 1], "task": ["x", "y", "z"]}),
        ["tasks.parquet", "[0, 1, 1]", "once"],
    ),
    "camera_of_two_sizes": (lambda r: write_video(r / SECOND, np.arange(4), size=48), [FRONT, SECOND, "48", "32"]),
    "video_of_another_rate": (lambda r: write_video(r / FRONT, np.arange(12), fps=20), [FRONT, "frame 1", "fps 10"]),
    "video_of_depth": (write_depth_video, [FRONT, "gray12le", "RGB"]),
    "video_missing": (lambda r: (r / WRIST).unlink(), [WRIST]),
    "video_cut_off": (lambda r: truncate(r / FRONT), [FRONT, "again"]),
    "video_too_short": (lambda r: write_video(r / FRONT, np.arange(11)), [FRONT, "11 frames", "12"]),
    "video_too_long": (lambda r: write_video(r / FRONT, np.arange(13)), [FRONT, "13 frames", "12"]),
    "video_is_text": (lambda r: (r / FRONT).write_text("no video"), [FRONT]),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_data_set_is_a_clear_error(name, tiny, cache):
    break_it, words = BREAKS[name]
    break_it(tiny)
    with pytest.raises((ValueError, OSError)) as error:
        LeRobotChunkDataset(tiny, 4, cache_dir=cache)
    assert [word for word in words if word not in str(error.value)] == []
    assert not list(cache.glob("*"))


def test_a_data_set_with_depth_cameras_alone_says_so(tiny, cache):
    shades = json.loads((tiny / "meta/info.json").read_text())["features"]
    edit_features(tiny, **{key: {**shades[key], "info": {"is_depth_map": True}} for key in SHADES})
    with pytest.raises(ValueError, match="depth maps") as error:
        LeRobotChunkDataset(tiny, 4, cache_dir=cache)
    assert all(key in str(error.value) for key in SHADES)


RECORDED = {
    "task": "push",
    "observation.image": np.zeros((3, 16, 16, 3), np.uint8),
    "observation.state": np.zeros((3, 2), np.float32),
    "action": np.zeros((3, 1), np.float32),
    "next.reward": np.zeros(3),
    "next.done": np.zeros(3, bool),
    "next.success": np.zeros(3, bool),
}


def write(root: Path, episodes: list, fps: int = 10, image_size: int = 16) -> None:
    axes = {"observation.state": ["x", "y"], "action": ["x"]}
    write_dataset(root, iter(episodes), fps=fps, robot_type="robot", axes=axes, image_size=image_size)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", "  "),
        ("task", None),
        ("observation.image", np.zeros((3, 8, 8, 3), np.uint8)),
        ("observation.image", np.zeros((3, 16, 16, 3))),
        ("observation.image", np.zeros((0, 16, 16, 3), np.uint8)),
        ("observation.state", np.full((3, 2), np.nan)),
        ("observation.state", np.zeros((2, 2))),
        ("action", np.zeros((3, 2))),
        ("action", np.full((3, 1), 1e39)),  # infinite in float32
        ("action", ["a", "b", "c"]),
        ("next.reward", np.full(3, np.inf)),
        ("next.done", np.zeros((3, 1), bool)),
        ("next.success", np.zeros(2, bool)),
    ],
)
def test_an_episode_is_checked_before_it_is_written(key, value, tmp_path):
    with pytest.raises(ValueError, match=rf"episodes\[1\]: {key}"):
        write(tmp_path / "set", [RECORDED, RECORDED | {key: value}])
    missing = {name: part for name, part in RECORDED.items() if name != key}
    with pytest.raises(ValueError, match=rf"episodes\[1\] has no {key}"):
        write(tmp_path / "set", [RECORDED, missing])
    assert not list(tmp_path.iterdir())


def test_an_episode_as_described_is_written_at_a_whole_rate(tmp_path, cache):
    for name, value in (("fps", 9.5), ("fps", 0), ("image_size", 0)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            write(tmp_path / "set", [RECORDED], **{name: value})
    write(tmp_path / "set", [RECORDED, RECORDED | {"action": [[1], [2], [3]]}])
    dataset = LeRobotChunkDataset(tmp_path / "set", 1, cache_dir=cache)
    assert dataset.actions[3:, 0].tolist() == [1, 2, 3] and dataset.fps == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"chunk_size": 0}, ["chunk_size is 0"]),
        ({"chunk_size": 1.5}, ["chunk_size is 1.5"]),
        ({"episodes": []}, ["episodes is []"]),
        ({"episodes": [0, 3]}, ["[0, 3]", "up to 2"]),
        ({"episodes": [-1]}, ["[-1]"]),
        ({"episodes": [1, 1]}, ["[1, 1]", "each once"]),
        ({"episodes": [0.5]}, ["[0.5]"]),
        ({"image_keys": [*SHADES][0]}, [f"image_keys is {[*SHADES][0]!r}, expected a list"]),
        ({"image_keys": []}, ["image_keys is []", *SHADES]),
        ({"image_keys": ["observation.image.top"]}, ["observation.image.top", *SHADES]),
    ],
)
def test_a_wrong_argument_is_a_clear_error(arguments, words, tiny, cache):
    with pytest.raises(ValueError) as error:
        LeRobotChunkDataset(tiny, **{"chunk_size": 4, "cache_dir": cache} | arguments)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_frame_that_is_not_finite_can_be_left_out(tiny, cache):
    edit_table(tiny / DATA, action=nan_at_row_3(ACTIONS))
    assert len(LeRobotChunkDataset(tiny, 4, episodes=[1, 2], cache_dir=cache)) == 11


def test_a_cache_that_cannot_be_written_is_a_clear_error(tiny, tmp_path, cache):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cache_dir is .*file.* cannot be created"):
        LeRobotChunkDataset(tiny, 4, cache_dir=tmp_path / "file")
    with pytest.raises(ValueError, match="inside the data set"):
        LeRobotChunkDataset(tiny, 4, cache_dir=tiny / "cache")
    with pytest.raises(ValueError, match="cache_dir is True"):
        LeRobotChunkDataset(tiny, 4, cache_dir=True)
    dataset = LeRobotChunkDataset(tiny, 4, cache_dir=cache)
    cache.rmdir()
    cache.write_text("")
    with pytest.raises(OSError, match=f"cache_dir is {cache}.* cannot be written.*cache_dir=False"):
        dataset[0]


def test_a_data_set_that_cannot_be_downloaded_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="'nobody/no-such-data-set'.*local copy"):
        download_dataset("nobody/no-such-data-set")
    monkeypatch.setattr(data, "snapshot_download", Mock(side_effect=httpx.ReadError("it was cut")))
    with pytest.raises(OSError, match="it was cut.*local copy"):
        download_dataset("nobody/no-such-data-set")


@pytest.fixture(scope="module")
def pusht(pusht_root):
    return LeRobotChunkDataset(pusht_root, chunk_size=16)


def test_pusht_is_read_whole(pusht, pusht_root):
    assert (len(pusht), len(np.unique(pusht.episode_index)), pusht.fps) == (25650, 206, 10)
    assert pusht.action_chunks().shape == (25650, 16, 2)
    assert pusht[0]["images"][0].shape == (96, 96, 3)
    assert pusht[0]["text"] == "Push the T-shaped block onto the T-shaped target."
    stats = json.loads((pusht_root / "meta/stats.json").read_text())
    for values, key in ((pusht.states, "observation.state"), (pusht.actions, "action")):
        np.testing.assert_allclose(values.min(0), stats[key]["min"])
        np.testing.assert_allclose(values.max(0), stats[key]["max"])


def test_pusht_images_show_the_agent_where_the_state_says(pusht):
    """Frame 30 of each episode: the video's compression smears the agent, a blue disc, in most odd frames."""
    frames = np.flatnonzero(pusht.frame_index == 30)
    assert len(frames) > 190

    def distances(shift: int) -> np.ndarray:
        """In pixels, from the blue disc to the state of the frame `shift` later."""
        centres = []
        for i in frames:
            blue = np.abs(pusht[i]["images"][0] - np.array([65, 105, 225])).max(axis=2) < 60
            centres.append(np.argwhere(blue).mean(axis=0)[::-1])
        return np.abs(np.array(centres) - (pusht.states[frames + shift] / 512 * 96 - 0.5)).max(axis=1)

    assert (distances(0) < 2).mean() > 0.97
    assert np.median(distances(0)) < 0.5
    assert min(np.median(distances(-1)), np.median(distances(1))) > 1
