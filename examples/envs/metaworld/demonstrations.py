"""Demonstrations of Meta-World's scripted experts, some of which take over from a policy.

A demonstration ends with its first success; one without success within `--max_steps` is dropped. In two of three the
arm is shoved once or twice: for 5 to 12 steps the hand moves in a random direction. The recorded actions are always
the expert's, so the data show how to recover.

With `--policy`, that policy plays the first 0 to 159 steps, and the demonstration begins where the expert takes over
(Kelly et al. 2019, arXiv 1810.02890).
"""

import argparse

import numpy as np
from evaluate import LoadedPolicy
from lerobot_writer import IMAGE_KEY, OUTCOMES

from ..takeover import load_once, play_policy
from .simulator import CONTROL_HZ, IMAGE_SIZE, MT10, TASKS, MetaworldScene

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
    policy: LoadedPolicy | None = None,
) -> dict[str, np.ndarray] | None:
    """Let the expert play one episode. Returns None if it does not succeed within `max_steps`.

    Args:
        draw_every: Steps from one rendered image to the next.
        policy: Plays first. If it succeeds, None is returned.

    Returns:
        Arrays of T steps by feature: `observation.state` `(T, 4)`, `observation.environment_state` `(T, 21)` (see
        [`MetaworldScene.poses`]), `action` `(T, 4)`, `next.reward` `(T,)`, `next.done`, `next.success`; and
        `observation.image`, every `draw_every`-th, uint8 `(-(-T // draw_every), 128, 128, 3)`.
    """
    rng = np.random.default_rng(seed)
    shoves = np.zeros((max_steps + 100, 3))  # where not zero, the hand's movement
    for _ in range(rng.integers(NUM_SHOVES)):
        start, length = rng.integers(80), rng.integers(5, 13)
        shoves[start : start + length] = rng.uniform(-1, 1, 3)
    # Without a policy, play first without rendering, and render only episodes that succeed.
    for draw in (False, True) if policy is None else (True,):
        scene.reset(seed)
        if policy is not None and play_policy(scene, policy, int(rng.integers(LEAD_IN)), TASKS[scene.task]):
            return None
        images, steps, success = [], [], False
        for t in range(max_steps):
            action = scene.expert_action()
            if draw and t % draw_every == 0:
                images += scene.images()
            before = (scene.state, scene.poses, action)
            executed = action.copy()
            if shoves[t].any():
                executed[:3] = shoves[t]
            reward, success, truncated = scene.step(executed)
            steps.append((*before, np.float32(reward), success, success))
            if success or truncated:
                break
        if not success:
            return None
    names = ("observation.state", "observation.environment_state", "action", *OUTCOMES)
    arrays = {name: np.array(values) for name, values in zip(names, zip(*steps, strict=True), strict=True)}
    return arrays | {IMAGE_KEY: np.array(images)}


class Demonstrations:
    """See `collect.py`."""

    dataset = DATASET
    defaults = {"draw_every": 1}
    counts = {"episodes": 1, "max_steps": 1}

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="MT10, or names of tasks (all 50)")
        parser.add_argument("--episodes", type=int, default=50, help="demonstrations of each task (50)")
        parser.add_argument("--max_steps", type=int, default=250, help="of a demonstration (250)")

    def __init__(self, args: argparse.Namespace):
        self.draw_every = args.draw_every
        tasks = MT10 if args.tasks == ["MT10"] else args.tasks
        self.parts = [f"{task}-{number:03d}" for number in range(args.episodes) for task in tasks]
        self.options = {"max_steps": args.max_steps, "policy": args.policy}

    def play(self, part: str) -> list[dict]:
        """The first of fifty demonstrations that succeeds."""
        global _scene
        task, _, number = part.rpartition("-")
        max_steps, checkpoint = self.options["max_steps"], self.options["policy"]
        policy = None if checkpoint is None else load_once(checkpoint)
        if _scene is None or _scene.task != task:
            if _scene is not None:
                _scene.close()
            _scene = MetaworldScene(task)
        first = (FIRST_SEED if policy is None else FIRST_CORRECTION) + list(TASKS).index(task) * 100_000
        for seed in range(first + int(number) * 50, first + int(number) * 50 + 50):
            episode = demonstrate(_scene, seed, max_steps, self.draw_every, policy)
            if episode is not None:
                return [episode | {"task": TASKS[task]}]
        raise ValueError(f"{task} failed 50 times in {max_steps} steps, or the policy solved it. Raise --max_steps.")
