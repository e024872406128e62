"""Record a policy's PushT rollouts as a LeRobot v3.0 data set, the layout of the hub's `lerobot/pusht`.

    python examples/record_rollouts.py --checkpoint checkpoints/pusht-tiny --episodes 50 --output_dir outputs/rollouts

Episode i resets its environment with seed + i. A frame holds what the policy saw, the action it took there, and the
reward that the action brought. Each table and the video is one file, which LeRobot and [`LeRobotChunkDataset`] open.
"""

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from eval_pusht import check_checkpoint, first_line, load_policy, make_predict
from pusht import CONTROL_HZ, ENV_ID, MAX_EPISODE_STEPS, TASK, Predict, check_chunks
from tqdm import tqdm

IMAGE_KEY, IMAGE_SIDE = "observation.image", 96
# Every second frame stands alone, so that a reader which wants one frame decodes two at most. At this quality the
# pusher stood at most about one pixel (of 96) off its place in the picture that the policy saw, half of one usually.
CODEC, CODEC_NAME, CODEC_OPTIONS = "libx264", "h264", {"g": "2", "crf": "18"}
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
VECTOR = {"dtype": "float32", "shape": [2], "names": {"axes": ["x", "y"]}}
FEATURES = {
    IMAGE_KEY: {
        "dtype": "video",
        "shape": [IMAGE_SIDE, IMAGE_SIDE, 3],
        "names": ["height", "width", "channel"],
        "info": {
            "video.height": IMAGE_SIDE,
            "video.width": IMAGE_SIDE,
            "video.codec": CODEC_NAME,
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": CONTROL_HZ,
            "video.channels": 3,
            "has_audio": False,
        },
    },
    "observation.state": VECTOR,
    "action": VECTOR,
} | {
    name: {"dtype": dtype, "shape": [1], "names": None}
    for name, dtype in {
        "next.reward": "float32",
        "next.done": "bool",
        "next.success": "bool",
        "timestamp": "float32",
        "frame_index": "int64",
        "episode_index": "int64",
        "index": "int64",
        "task_index": "int64",
    }.items()
}


def play(predict: Predict, seed: int, n_action_steps: int, max_steps: int) -> dict[str, np.ndarray]:
    """Play one episode and keep what the policy saw and did.

    Args:
        predict: See [`pusht.Predict`].
        seed: Of the environment's reset.
        n_action_steps: Actions of each chunk that are executed before the next prediction.
        max_steps: Steps after which the episode ends unsolved.

    Returns:
        Arrays of T steps under the features' names: `observation.image` uint8 `(T, 96, 96, 3)`, `observation.state`
        and `action` float32 `(T, 2)` in the simulator's units, `next.reward` `(T,)`, `next.done`, `next.success`.

    Raises:
        ValueError: a chunk of the wrong shape or with a value that is not finite.
    """
    rows: dict[str, list] = {name: [] for name in FEATURES if name.startswith(("observation", "action", "next"))}
    queue: list[np.ndarray] = []
    env = gymnasium.make(ENV_ID, obs_type="pixels_agent_pos", max_episode_steps=max_steps)
    with contextlib.closing(env):
        observation, _ = env.reset(seed=seed)
        done = False
        while not done:
            state = observation["agent_pos"].astype(np.float32)
            if not queue:
                chunks = check_chunks(predict([observation["pixels"]], state[None]), 1, n_action_steps)
                queue = list(chunks[0, :n_action_steps])
            action = queue.pop(0)
            seen = observation["pixels"]
            observation, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            for name, value in zip(rows, (seen, state, action, reward, done, info["is_success"]), strict=True):
                rows[name].append(value)
    return {name: np.asarray(values, _dtype(name)) for name, values in rows.items()}


def write_dataset(root: Path, episodes: Iterator[dict[str, np.ndarray]], task: str = TASK) -> dict:
    """Write episodes as a LeRobot v3.0 data set. The folder appears when all of it has been written.

    Args:
        root: Folder that does not exist yet.
        episodes: What [`play`] returns, one at a time; only the low-dimensional columns are kept in memory.
        task: The sentence they all carry.

    Returns:
        `meta/info.json`.

    Raises:
        ValueError: no episode.
        OSError: the folder is there already (`FileExistsError`), or cannot be written.
    """
    if root.exists():
        raise FileExistsError(f"{root} is there already, and is not overwritten. Name another folder.")
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        info = _write_files(partial, episodes, task)
        os.replace(partial, root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return info


def _write_files(root: Path, episodes: Iterator[dict[str, np.ndarray]], task: str) -> dict:
    video_path = root / f"videos/{IMAGE_KEY}/chunk-000/file-000.mp4"
    video_path.parent.mkdir(parents=True)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in FEATURES if name != IMAGE_KEY}
    histograms, table, start = [], [], 0
    with av.open(str(video_path), "w") as container:
        stream = container.add_stream(CODEC, rate=CONTROL_HZ, pix_fmt="yuv420p", options=CODEC_OPTIONS)
        stream.width = stream.height = IMAGE_SIDE
        stream.time_base = Fraction(1, CONTROL_HZ)
        for number, episode in enumerate(episodes):
            images = episode[IMAGE_KEY]
            for i, image in enumerate(images):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts = start + i
                container.mux(stream.encode(frame))
            n, frames = len(images), np.arange(len(images))
            episode = episode | {
                "timestamp": frames / CONTROL_HZ,
                "frame_index": frames,
                "episode_index": np.full(n, number),
                "index": start + frames,
                "task_index": np.zeros(n),
            }
            for name, values in columns.items():
                values.append(episode[name].astype(_dtype(name)))
            histograms.append(np.stack([np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(images, 3, 0)]))
            low = {name: values[-1] for name, values in columns.items()}
            table.append(_episode_row(number, start, n, task) | _flat(_statistics(low, histograms[-1], n)))
            start += n
        container.mux(stream.encode(None))
    if not table:
        raise ValueError("There is no episode to write. Record at least one.")

    whole = {name: np.concatenate(values) for name, values in columns.items()}
    info = {
        "codebase_version": "v3.0",
        "robot_type": "pusht",
        "total_episodes": len(table),
        "total_frames": start,
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": CONTROL_HZ,
        "splits": {"train": f"0:{len(table)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": FEATURES,
    }
    _write_table(root / "data/chunk-000/file-000.parquet", pa.table({k: _column(v) for k, v in whole.items()}))
    _write_table(root / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(table))
    _write_table(root / "meta/tasks.parquet", _tasks_table(task))
    for name, content in {"info": info, "stats": _statistics(whole, sum(histograms), start)}.items():
        (root / f"meta/{name}.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    return info


def _dtype(name: str) -> str:
    return "uint8" if name == IMAGE_KEY else FEATURES[name]["dtype"]


def _column(values: np.ndarray) -> pa.Array:
    """`(N,)` numbers, or `(N, D)` as lists of D."""
    flat = pa.array(values.ravel())
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _episode_row(number: int, start: int, length: int, task: str) -> dict:
    """What locates an episode in the files, in the words of LeRobot's episodes table."""
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
    }


def _statistics(columns: dict[str, np.ndarray], histogram: np.ndarray, num_frames: int) -> dict[str, dict]:
    """LeRobot's statistics of each feature; an image's are a channel's, in [0, 1], from its histogram `(3, 256)`."""
    levels, statistics = np.arange(256) / 255, {}
    channels = {"min": [], "max": [], "mean": [], "std": [], **{name: [] for name in QUANTILES}}
    for weights in histogram:
        seen, mean = levels[weights > 0], np.average(levels, weights=weights)
        numbers = [seen[0], seen[-1], mean, np.sqrt(np.average((levels - mean) ** 2, weights=weights))]
        shares = list(QUANTILES.values())
        numbers += list(np.quantile(levels, shares, weights=weights, method="inverted_cdf"))
        for values, number in zip(channels.values(), numbers, strict=True):
            values.append([[float(number)]])
    statistics[IMAGE_KEY] = channels | {"count": [num_frames]}
    for name, values in columns.items():
        values = values.reshape(num_frames, -1).astype(np.float64)
        numbers = {kind: getattr(values, kind)(axis=0) for kind in ("min", "max", "mean", "std")}
        numbers |= {kind: np.quantile(values, share, axis=0) for kind, share in QUANTILES.items()}
        statistics[name] = {kind: number.tolist() for kind, number in numbers.items()} | {"count": [num_frames]}
    return statistics


def _flat(statistics: dict[str, dict]) -> dict:
    return {f"stats/{name}/{kind}": value for name, kinds in statistics.items() for kind, value in kinds.items()}


def _tasks_table(task: str) -> pa.Table:
    """The table of tasks; LeRobot reads it with pandas and looks sentences up in its index."""
    table = pa.table({"task_index": pa.array([0]), "task": pa.array([task])})
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_kind, "metadata": None}
        for name, (kind, numpy_kind) in kinds.items()
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns}
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Record a policy's PushT rollouts as a LeRobot v3.0 data set.")
    parser.add_argument("--checkpoint", required=True, help="folder that train_pusht.py wrote, or a Hub id")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the data set, which is made")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=2000, help="episode i resets its environment with seed + i (2000)")
    parser.add_argument("--max_steps", type=int, default=MAX_EPISODE_STEPS, help=f"({MAX_EPISODE_STEPS})")
    args = parser.parse_args(argv)
    for name, least in {"episodes": 1, "max_steps": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}. Give at least {least}.")
    check_checkpoint(parser, args)
    return parser, args


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    try:
        model, processor = load_policy(args.checkpoint)
    except (OSError, ValueError) as error:
        parser.error(f"--checkpoint {args.checkpoint} cannot be loaded: {first_line(error)}")
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
