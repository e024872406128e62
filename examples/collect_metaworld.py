"""Collect demonstrations of Meta-World's scripted experts as a LeRobot v3.0 data set.

    python examples/collect_metaworld.py --output_dir outputs/metaworld --episodes 50
    python examples/collect_metaworld.py --output_dir outputs/corrections --episodes 10 --policy outputs/metaworld-tiny

Uses all cores. Each finished demonstration is a file in `<output_dir>.parts`; started again, it goes on from there,
and with more `--episodes` it adds to them. The data set itself is never overwritten: rename it first.

Only demonstrations that succeed within `--max_steps` are kept, up to the first success. In two of three the arm is
shoved once or twice: for 5 to 12 steps the hand is driven in a random direction. The recorded actions are the expert's
throughout, so the data show how to come back.

Drawing takes most of the time. With `--draw_every 4` the camera has a quarter of the control's rate: the frames
between show its last image, and `train.py --sample_every 4` starts no sample from them.

With `--policy`, that policy plays first, for up to 160 steps, and a demonstration begins where the expert takes over:
corrections of what the policy gets wrong (Kelly et al. 2019, arXiv 1810.02890).
"""

import argparse
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import interrupt  # noqa: F401 - before all that takes long
import numpy as np
import torch
from envs.metaworld import CONTROL_HZ, IMAGE_SIZE, TASKS, MetaworldScene
from envs.metaworld.simulator import MT10
from evaluate import load_policy, make_predict, write_json
from lerobot_writer import write_dataset
from rollouts import Predict
from tqdm import tqdm

from smolandfast.files_smolandfast import atomic_write, check_new_folder, check_output_dir, read_json

FIRST_SEED, FIRST_CORRECTION = 1_000_000, 100_000_000  # evaluation seeds are below
NUM_SHOVES = 3  # 0, 1 or 2 in a demonstration
POSITION, ROTATION = ["x", "y", "z"], ["qx", "qy", "qz", "qw"]
HAND = [*POSITION, "gripper"]
POSES = [*HAND, *(f"{thing}_{axis}" for thing in ("object", "other") for axis in POSITION + ROTATION)]
DATASET = {
    "fps": CONTROL_HZ,
    "robot_type": "metaworld",
    "axes": {
        "observation.state": HAND,
        "observation.environment_state": POSES + [f"goal_{axis}" for axis in POSITION],
        "action": HAND,
    },
    "image_size": IMAGE_SIZE,
    # Objects are five pixels wide, and told apart by their colours.
    "crf": 12,
    "pix_fmt": "yuv444p",
}
LEAD_IN = 160  # steps that a policy plays at most before the expert takes over
_scene: MetaworldScene | None = None  # what this process has played last
_policy: tuple[Predict, int] | None = None  # and how many actions of each chunk are executed


def demonstrate(
    scene: MetaworldScene,
    seed: int,
    max_steps: int,
    draw_every: int = 1,
    policy: tuple[Predict, int] | None = None,
) -> dict[str, np.ndarray] | None:
    """Let the expert play one episode; None if it does not succeed within `max_steps`.

    Each image stands in `draw_every` frames, and is new in the first of them. A policy, which is a `predict` and the
    number of actions of a chunk to execute, plays first; None also if it succeeds.

    Returns:
        Arrays of T steps by feature: `observation.image` uint8 `(T, 128, 128, 3)`, `observation.state` `(T, 4)`,
        `observation.environment_state` `(T, 21)` (see [`MetaworldScene.poses`]), `action` `(T, 4)`, `next.reward`
        `(T,)`, `next.done`, `next.success`.
    """
    rng = np.random.default_rng(seed)
    shoves = np.zeros((max_steps + 100, 3))  # where not zero, this moves the hand
    for _ in range(rng.integers(NUM_SHOVES)):
        start, length = rng.integers(80), rng.integers(5, 13)
        shoves[start : start + length] = rng.uniform(-1, 1, 3)
    # Draw only what will be kept: play once without images. A policy has to see, and it is not played twice.
    for draw in (False, True) if policy is None else (True,):
        scene.reset(seed)
        if policy is not None and play_policy(scene, *policy, num_steps=int(rng.integers(LEAD_IN))):
            return None
        steps, success = [], False
        for t in range(max_steps):
            action = scene.expert_action()
            if t % draw_every == 0:
                image = scene.image() if draw else None
            before = (image, scene.state, scene.poses, action)
            executed = action.copy()
            if shoves[t].any():
                executed[:3] = shoves[t]
            reward, success, truncated = scene.step(executed)
            steps.append((*before, np.float32(reward), success, success))
            if success or truncated:
                break
        if not success:
            return None
    names = ("observation.image", "observation.state", "observation.environment_state", "action", "next.reward")
    names += ("next.done", "next.success")
    return {name: np.array(values) for name, values in zip(names, zip(*steps, strict=True), strict=True)}


def play_policy(scene: MetaworldScene, predict: Predict, n_action_steps: int, num_steps: int) -> bool:
    """Let a policy play; returns whether it succeeded, or the time is over."""
    for start in range(0, num_steps, n_action_steps):
        chunk = predict([scene.image()], scene.state[None], [TASKS[scene.task]])[0]
        for action in chunk[: min(n_action_steps, num_steps - start)]:
            _, success, truncated = scene.step(action)
            if success or truncated:
                return True
    return False


def load(checkpoint: str | None) -> None:
    """What a process does first."""
    global _policy
    torch.set_num_threads(1)
    if checkpoint is not None:
        model, processor = load_policy(checkpoint)
        _policy = make_predict(model, processor), model.config.n_action_steps


def collect(job: tuple[str, int], folder: Path, max_steps: int, draw_every: int) -> None:
    """Write demonstration `job = (task, number)` to its file."""
    global _scene
    task, number = job
    if _scene is None or _scene.task != task:
        if _scene is not None:
            _scene.close()
        _scene = MetaworldScene(task)
    for attempt in range(50):
        first = FIRST_SEED if _policy is None else FIRST_CORRECTION
        seed = first + list(TASKS).index(task) * 100_000 + number * 50 + attempt
        episode = demonstrate(_scene, seed, max_steps, draw_every, _policy)
        if episode is not None:
            with atomic_write(part_path(folder, task, number)) as path, open(path, "wb") as file:
                np.savez_compressed(file, **episode)
            return
    raise ValueError(f"{task} failed 50 times in {max_steps} steps, or the policy solved it. Raise --max_steps.")


def part_path(folder: Path, task: str, number: int) -> Path:
    return folder / f"{task}-{number:03d}.npz"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Collect demonstrations of Meta-World's experts.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/metaworld"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="MT10, or names of tasks (all 50)")
    parser.add_argument("--episodes", type=int, default=50, help="demonstrations of each task (50)")
    parser.add_argument("--max_steps", type=int, default=250, help="of a demonstration (250)")
    parser.add_argument("--draw_every", type=int, default=1, help="steps from one image to the next (1)")
    parser.add_argument("--policy", help="checkpoint of a policy that plays until the expert takes over")
    parser.add_argument("--num_processes", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    for name in ("episodes", "max_steps", "draw_every", "num_processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}. Give at least 1.")
    tasks = MT10 if args.tasks == ["MT10"] else args.tasks
    folder = args.output_dir.with_name(args.output_dir.name + ".parts")
    try:
        check_new_folder(args.output_dir)
        check_output_dir(folder, ["options.json", "*.npz", ".*"])  # the last are unfinished files
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(f"--output_dir: {error}")
    options = {"max_steps": args.max_steps, "draw_every": args.draw_every, "policy": args.policy}
    begun = folder / "options.json"
    if not begun.exists():
        write_json(begun, options)
    elif read_json(begun) != options:
        parser.error(f"{folder} was begun with {read_json(begun)}, now it is {options}. Name another --output_dir.")
    jobs = [(task, number) for number in range(args.episodes) for task in tasks]
    # Task by task: a scene takes 150 MB and two seconds to load.
    missing = sorted(
        (job for job in jobs if not part_path(folder, *job).exists()), key=lambda job: tasks.index(job[0])
    )
    spawn = multiprocessing.get_context("spawn")  # a forked copy of a process that has drawn hangs
    play = partial(collect, folder=folder, max_steps=args.max_steps, draw_every=args.draw_every)
    episodes = (dict(np.load(part_path(folder, *job))) | {"task": TASKS[job[0]]} for job in jobs)
    try:
        with ProcessPoolExecutor(args.num_processes, spawn, load, (args.policy,)) as pool:
            # Processes that are started now ignore Ctrl-C: they finish the demonstration that they play.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            work = pool.map(play, missing)
            signal.signal(signal.SIGINT, handler)
            for _ in tqdm(work, total=len(jobs), initial=len(jobs) - len(missing), unit="demonstration"):
                pass
        info = write_dataset(args.output_dir, tqdm(episodes, total=len(jobs), unit="demonstration"), **DATASET)
    except FileExistsError as error:
        parser.error(f"--output_dir: {error}")
    except KeyboardInterrupt:
        parser.exit(130, f"\nInterrupted. {folder} keeps what is finished: the same command goes on from there.\n")
    print(f"{info['total_episodes']} demonstrations, {info['total_frames']} frames in {args.output_dir}")


if __name__ == "__main__":
    main()
