"""Collect demonstrations of Meta-World's scripted experts as a LeRobot v3.0 data set.

    python examples/collect_metaworld.py --output_dir outputs/metaworld --episodes 50
    python examples/collect_metaworld.py --output_dir outputs/corrections --episodes 10 --policy outputs/metaworld-tiny

Each finished demonstration is a file in `<output_dir>.parts`. The same command continues after an interruption, and
more `--episodes` add to the demonstrations. An existing data set is never overwritten: rename it first.

A demonstration ends with its first success; one without success within `--max_steps` is dropped. In two of three the
arm is shoved once or twice: for 5 to 12 steps the hand moves in a random direction. The recorded actions are always
the expert's, so the data show how to recover.

Rendering takes most of the time. With `--draw_every 4`, every fourth step is rendered and its image is repeated in the
steps between; train on it with `--sample_every 4`.

With `--policy`, that policy plays the first 0 to 159 steps, and the demonstration begins where the expert takes over
(Kelly et al. 2019, arXiv 1810.02890).
"""

import argparse
import functools
import os
from pathlib import Path

import interrupt  # noqa: F401 - before the slow imports
import numpy as np
from envs.metaworld import CONTROL_HZ, IMAGE_SIZE, TASKS, MetaworldScene
from envs.metaworld.simulator import MT10
from evaluate import check_counts, error_line, load_policy, make_predict, map_in_processes, write_json
from lerobot_writer import write_dataset
from rollouts import Predict
from tqdm import tqdm

from smolandfast.files_smolandfast import atomic_write, check_new_folder, check_output_dir, read_json

FIRST_SEED, FIRST_CORRECTION = 1_000_000, 100_000_000  # evaluations have lower seeds
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
    # Objects are five pixels wide, and their colours tell them apart.
    "crf": 12,
    "pix_fmt": "yuv444p",
}
LEAD_IN = 160  # the policy plays fewer steps than this before the expert takes over
_scene: MetaworldScene | None = None  # the last scene of this process


def demonstrate(
    scene: MetaworldScene,
    seed: int,
    max_steps: int,
    draw_every: int = 1,
    policy: tuple[Predict, int] | None = None,
) -> dict[str, np.ndarray] | None:
    """Let the expert play one episode. Returns None if it does not succeed within `max_steps`.

    Args:
        draw_every: Steps from one rendered image to the next.
        policy: A `predict` and its `n_action_steps`, which play first. If they succeed, None is returned.

    Returns:
        Arrays of T steps by feature: `observation.image` uint8 `(T, 128, 128, 3)`, `observation.state` `(T, 4)`,
        `observation.environment_state` `(T, 21)` (see [`MetaworldScene.poses`]), `action` `(T, 4)`, `next.reward`
        `(T,)`, `next.done`, `next.success`.
    """
    rng = np.random.default_rng(seed)
    shoves = np.zeros((max_steps + 100, 3))  # where not zero, the hand's movement
    for _ in range(rng.integers(NUM_SHOVES)):
        start, length = rng.integers(80), rng.integers(5, 13)
        shoves[start : start + length] = rng.uniform(-1, 1, 3)
    # Without a policy, play first without rendering, and render only episodes that succeed.
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
    """Let a policy play. Returns whether the episode is over."""
    for start in range(0, num_steps, n_action_steps):
        chunk = predict([scene.image()], scene.state[None], [TASKS[scene.task]])[0]
        for action in chunk[: min(n_action_steps, num_steps - start)]:
            _, success, truncated = scene.step(action)
            if success or truncated:
                return True
    return False


@functools.cache
def load(checkpoint: str) -> tuple[Predict, int]:
    model, processor = load_policy(checkpoint)
    return make_predict(model, processor), model.config.n_action_steps


def collect(job: tuple[str, int], folder: Path, max_steps: int, draw_every: int, policy: str | None) -> None:
    """Write demonstration `job = (task, number)` to its file."""
    global _scene
    task, number = job
    if _scene is None or _scene.task != task:
        if _scene is not None:
            _scene.close()
        _scene = MetaworldScene(task)
    first = (FIRST_SEED if policy is None else FIRST_CORRECTION) + list(TASKS).index(task) * 100_000 + number * 50
    for seed in range(first, first + 50):
        episode = demonstrate(_scene, seed, max_steps, draw_every, None if policy is None else load(policy))
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
    parser.add_argument("--num_processes", type=int, default=os.cpu_count(), help="(all cores)")
    args = parser.parse_args(argv)
    check_counts(parser, args, episodes=1, max_steps=1, draw_every=1, num_processes=1)
    tasks = MT10 if args.tasks == ["MT10"] else args.tasks
    folder = args.output_dir.with_name(args.output_dir.name + ".parts")
    with error_line(parser, "--output_dir: "):
        check_new_folder(args.output_dir)
        check_output_dir(folder, ["options.json", "*.npz", ".*"])  # the last are unfinished files
        folder.mkdir(parents=True, exist_ok=True)
    options = {"max_steps": args.max_steps, "draw_every": args.draw_every, "policy": args.policy}
    path = folder / "options.json"
    if not path.exists():
        write_json(path, options)
    elif read_json(path) != options:
        parser.error(f"{folder} was begun with {read_json(path)}, now it is {options}. Name another --output_dir.")
    jobs = [(task, number) for number in range(args.episodes) for task in tasks]
    missing = [job for job in jobs if not part_path(folder, *job).exists()]
    missing.sort(key=lambda job: tasks.index(job[0]))  # loading a scene takes seconds
    episodes = (dict(np.load(part_path(folder, *job))) | {"task": TASKS[job[0]]} for job in jobs)
    bar = functools.partial(tqdm, total=len(jobs), unit="demonstration")
    try:
        with error_line(parser):
            play = functools.partial(collect, folder=folder, **options)
            for _ in bar(map_in_processes(args.num_processes, play, missing), initial=len(jobs) - len(missing)):
                pass
            info = write_dataset(args.output_dir, bar(episodes), **DATASET)
    except KeyboardInterrupt:
        parser.exit(130, f"\nInterrupted. {folder} keeps the finished demonstrations: run the same command again.\n")
    print(f"{info['total_episodes']} demonstrations, {info['total_frames']} frames in {args.output_dir}")


if __name__ == "__main__":
    main()
