"""Record a policy's PushT rollouts as a LeRobot v3.0 data set, in the layout of the Hub's `lerobot/pusht`.

    python examples/record_rollouts.py --checkpoint checkpoints/pusht-tiny --episodes 50 --output_dir outputs/rollouts

Episode i resets its environment with seed + i. A frame holds what the policy saw, the action it took, and the reward
of that action. Each table is one file, and so is the video; LeRobot and [`LeRobotChunkDataset`] read them.
"""

import argparse
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from eval_pusht import check_checkpoint, check_counts, load_checkpoint, make_predict
from pusht import CONTROL_HZ, MAX_EPISODE_STEPS, TASK, Episode, Predict, rollout
from tqdm import tqdm

from smolandfast.files_smolandfast import written_whole

IMAGE_KEY, IMAGE_SIZE = "observation.image", 96
# Every second frame is a key frame, so reading any one frame decodes at most two. At this quality the pusher appears
# about half a pixel (of 96) off where the policy saw it, about one at most.
CODEC_OPTIONS = {"g": "2", "crf": "18"}
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
VECTOR = {"dtype": "float32", "shape": [2], "names": {"axes": ["x", "y"]}}
IMAGE = {
    "dtype": "video",
    "shape": [IMAGE_SIZE, IMAGE_SIZE, 3],
    "names": ["height", "width", "channel"],
    "info": {
        "video.height": IMAGE_SIZE,
        "video.width": IMAGE_SIZE,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": CONTROL_HZ,
        "video.channels": 3,
        "has_audio": False,
    },
}
SCALARS = {"next.reward": "float32", "next.done": "bool", "next.success": "bool", "timestamp": "float32"}
SCALARS |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
FEATURES = {IMAGE_KEY: IMAGE, "observation.state": VECTOR, "action": VECTOR}
FEATURES |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in SCALARS.items()}


def play(predict: Predict, seed: int, n_action_steps: int, max_steps: int) -> dict[str, np.ndarray]:
    """Play one episode, see [`pusht.rollout`], and keep what the policy saw and did.

    Returns:
        Arrays of T steps by feature: `observation.image` uint8 `(T, 96, 96, 3)`, `observation.state` and `action`
        float32 `(T, 2)` in the simulator's units, `next.reward` `(T,)`, `next.done`, `next.success`.
    """
    steps = []

    def keep(episode: Episode, image: np.ndarray, state: np.ndarray, action: np.ndarray) -> None:
        reward = np.float32(episode.rewards[-1])
        steps.append((image, state, action, reward, episode.done, episode.success))

    rollout(predict, [seed], n_action_steps, max_steps=max_steps, on_step=keep)
    names = (IMAGE_KEY, "observation.state", "action", "next.reward", "next.done", "next.success")
    return {name: np.array(values) for name, values in zip(names, zip(*steps, strict=True), strict=True)}


def write_dataset(root: Path, episodes: Iterator[dict[str, np.ndarray]], task: str = TASK) -> dict:
    """Write episodes as a LeRobot v3.0 data set. The folder appears once everything in it is written.

    Args:
        root: Folder that does not exist yet.
        episodes: What [`play`] returns, one at a time; all but the images are kept in memory.
        task: The sentence of all episodes.

    Returns:
        `meta/info.json`.

    Raises:
        ValueError: no episode.
        OSError: the folder exists (`FileExistsError`), or cannot be written.
    """
    if root.exists():
        raise FileExistsError(f"{root} exists, and is not overwritten. Name another folder.")
    with written_whole(root) as folder:
        video_path = folder / f"videos/{IMAGE_KEY}/chunk-000/file-000.mp4"
        video_path.parent.mkdir(parents=True)
        columns: dict[str, list[np.ndarray]] = {name: [] for name in FEATURES if name != IMAGE_KEY}
        histograms, rows, start = [], [], 0
        with av.open(str(video_path), "w") as container:
            stream = container.add_stream("libx264", rate=CONTROL_HZ, pix_fmt="yuv420p", options=CODEC_OPTIONS)
            stream.width = stream.height = IMAGE_SIZE
            stream.time_base = Fraction(1, CONTROL_HZ)
            for episode in episodes:
                images = episode[IMAGE_KEY]
                for i, image in enumerate(images, start):
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    frame.pts = i
                    container.mux(stream.encode(frame))
                n = len(images)
                episode = episode | {
                    "timestamp": np.arange(n) / CONTROL_HZ,
                    "frame_index": np.arange(n),
                    "episode_index": np.full(n, len(rows)),
                    "index": np.arange(start, start + n),
                    "task_index": np.zeros(n),
                }
                for name, values in columns.items():
                    values.append(episode[name].astype(FEATURES[name]["dtype"]))
                histograms.append(np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)]))
                statistics = _statistics({name: values[-1] for name, values in columns.items()}, histograms[-1])
                rows.append(_episode_row(len(rows), start, n, task, statistics))
                start += n
            container.mux(stream.encode(None))
        if not rows:
            raise ValueError("There is no episode to write. Record at least one.")
        frames = {name: np.concatenate(values) for name, values in columns.items()}
        _write_tables(folder, frames, rows, task)
        info = {
            "codebase_version": "v3.0",
            "robot_type": "pusht",
            "total_episodes": len(rows),
            "total_frames": start,
            "total_tasks": 1,
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": CONTROL_HZ,
            "splits": {"train": f"0:{len(rows)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            "features": FEATURES,
        }
        for name, content in {"info": info, "stats": _statistics(frames, sum(histograms))}.items():
            (folder / f"meta/{name}.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    return info


def _write_tables(root: Path, frames: dict[str, np.ndarray], episode_rows: list[dict], task: str) -> None:
    vectors = {name for name, values in frames.items() if values.ndim == 2}
    frames = {k: pa.array(list(v), pa.list_(pa.float32(), 2)) if k in vectors else v for k, v in frames.items()}
    # LeRobot reads the tasks with pandas and looks the sentence up in the index.
    dtypes = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype, "metadata": None}
        for name, (kind, dtype) in dtypes.items()
    ]
    pandas = json.dumps({"index_columns": ["task"], "column_indexes": [], "columns": columns})
    tables = {
        "data/chunk-000/file-000.parquet": pa.table(frames),
        "meta/episodes/chunk-000/file-000.parquet": pa.Table.from_pylist(episode_rows),
        "meta/tasks.parquet": pa.table({"task_index": [0], "task": [task]}, metadata={"pandas": pandas}),
    }
    for name, table in tables.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / name)


def _episode_row(number: int, start: int, length: int, task: str, statistics: dict[str, dict]) -> dict:
    """Where an episode is in the files, and its statistics: a row of LeRobot's episodes table."""
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
        f"{video}/from_timestamp": start / CONTROL_HZ,
        f"{video}/to_timestamp": (start + length) / CONTROL_HZ,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    } | {f"stats/{name}/{kind}": value for name, kinds in statistics.items() for kind, value in kinds.items()}


def _statistics(columns: dict[str, np.ndarray], histogram: np.ndarray) -> dict[str, dict]:
    """LeRobot's statistics of each feature; an image's are per channel, in [0, 1], from its histogram `(3, 256)`."""
    channels = [_summary(np.flatnonzero(counts) / 255, counts[counts > 0]) for counts in histogram]
    statistics = {IMAGE_KEY: {kind: [[[channel[kind]]] for channel in channels] for kind in channels[0]}}
    for name, values in columns.items():
        axes = [_summary(axis) for axis in values.reshape(len(values), -1).T.astype(np.float64)]
        statistics[name] = {kind: [axis[kind] for axis in axes] for kind in axes[0]}
    return {name: kinds | {"count": [len(columns["index"])]} for name, kinds in statistics.items()}


def _summary(values: np.ndarray, counts: np.ndarray | None = None) -> dict[str, float]:
    """Statistics of the numbers `(N,)`, of which the i-th occurs `counts[i]` times, by default once."""
    mean = np.average(values, weights=counts)
    std = np.sqrt(np.average((values - mean) ** 2, weights=counts))
    method = "linear" if counts is None else "inverted_cdf"
    quantiles = np.quantile(values, list(QUANTILES.values()), weights=counts, method=method)
    numbers = [values.min(), values.max(), mean, std, *quantiles]
    return dict(zip(("min", "max", "mean", "std", *QUANTILES), map(float, numbers), strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Record a policy's PushT rollouts as a LeRobot v3.0 data set.")
    parser.add_argument("--checkpoint", required=True, help="folder that train_pusht.py wrote, or a Hub id")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for the data set")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=2000, help="episode i resets its environment with seed + i (2000)")
    parser.add_argument("--max_steps", type=int, default=MAX_EPISODE_STEPS, help=f"({MAX_EPISODE_STEPS})")
    args = parser.parse_args(argv)
    check_counts(parser, args, episodes=1, max_steps=1, seed=0)
    check_checkpoint(parser, args)
    model, processor = load_checkpoint(parser, args)
    predict = make_predict(model, processor)
    seeds = tqdm(range(args.seed, args.seed + args.episodes), unit="episode")
    episodes = (play(predict, seed, model.config.n_action_steps, args.max_steps) for seed in seeds)
    try:
        info = write_dataset(args.output_dir, episodes)
    except FileExistsError as error:
        parser.error(f"--output_dir: {error}")
    print(f"{info['total_episodes']} episodes, {info['total_frames']} frames in {args.output_dir}")


if __name__ == "__main__":
    main()
