"""Demonstrations of SO-101's expert: scenes in which all three instructions are played from one start.

With `--policy`, that policy plays the first 0 to 79 steps, and the demonstration begins where the expert takes over.
"""

import argparse
import functools
import logging

import numpy as np

from ..takeover import load_once, play_policy
from .expert import Expert, Kinematics
from .simulator import COLORS, CONTROL_HZ, IMAGE_KEYS, IMAGE_SIZE, JOINTS, LIFTED, TASKS, SO101Scene

FIRST_SEED, FIRST_CORRECTION = 1_000_000, 100_000_000  # evaluations have lower seeds
LEAD_IN = 80  # the policy plays fewer steps than this before the expert takes over
MAX_STEPS = 110  # of a demonstration
STEPS_AFTER = 10  # that a demonstration goes on after its success
POSE = ["x", "y", "z", "qw", "qx", "qy", "qz"]
DATASET = {
    "fps": CONTROL_HZ,
    "robot_type": "so_follower",
    "axes": {
        "observation.state": JOINTS,
        "action": JOINTS,
        "observation.environment_state": [f"fingertips_{axis}" for axis in POSE[:3]]
        + [f"{color}_{axis}" for color in COLORS for axis in POSE],
    },
    "image_size": IMAGE_SIZE,
    "image_keys": IMAGE_KEYS,
    # A cube is four pixels wide, and its colour tells it apart.
    "crf": 15,
    "pix_fmt": "yuv444p",
    "images_repeat": True,
    "is_recording": True,
}


def random_start(scene: SO101Scene, seed: int) -> np.ndarray | None:
    """Where the arm begins: None, at rest (40 %); or joints `(6,)` in LeRobot's units, in the air or near a cube."""
    rng, kinematics = np.random.default_rng(seed), Kinematics(scene)
    kind = rng.choice(["rest", "air", "near"], p=[0.4, 0.3, 0.3])
    if kind == "rest":
        return None
    scene.reset(seed)
    for _ in range(20):
        if kind == "air":
            distance, angle, height = rng.uniform(0.2, 0.43), rng.uniform(-0.7, 0.7), rng.uniform(0.05, 0.17)
            position = np.array([distance * np.cos(angle), distance * np.sin(angle), height])
            opening = rng.uniform(0, 60)
        else:
            cube = scene.cube(COLORS[rng.integers(3)])[:3]
            position = cube + [*rng.uniform(-0.04, 0.04, 2), rng.uniform(0.0, 0.07)]
            opening = rng.choice([50, rng.uniform(0, 60)])
        pan = np.arctan2(position[1], position[0])
        joints = np.array([-pan, np.radians(30), np.radians(-40), np.radians(75), 0])
        joints, distance = kinematics.solve(joints, position, pan + rng.uniform(-0.9, 0.9))
        if distance < 0.01:
            break
    return np.append(np.degrees(joints), opening)


def demonstrate(
    scene: SO101Scene, draw_every: int, first_images: list[np.ndarray] | None = None
) -> dict[str, np.ndarray] | None:
    """Let the expert play on. Returns None if the cube is not lifted, or falls in the last steps.

    Args:
        draw_every: Steps from one rendered image to the next.
        first_images: The images at the start, where they are known.

    Returns:
        Arrays of T steps by feature: `observation.state` `(T, 6)`, `observation.environment_state` `(T, 24)` (see
        [`SO101Scene.poses`]), `action` `(T, 6)`; and the rendered images, every `draw_every`-th of each camera.
    """
    expert, steps, images, end = Expert(scene), [], [], None
    for t in range(MAX_STEPS):
        action = expert.action()
        if t % draw_every == 0:
            images.append(scene.images() if t > 0 or first_images is None else first_images)
        steps.append((scene.state, scene.poses, action.astype(np.float32)))
        _, success, _ = scene.step(action)
        if success and end is None:
            end = t + STEPS_AFTER
        if t == end:
            break
    else:
        return None
    if scene.cube(scene.task)[2] < LIFTED:  # dropped after all
        return None
    names = ("observation.state", "observation.environment_state", "action")
    arrays = dict(zip(names, map(np.array, zip(*steps, strict=True)), strict=True))
    return arrays | dict(zip(IMAGE_KEYS, map(np.array, zip(*images, strict=True)), strict=True))


@functools.cache
def load_scene() -> SO101Scene:
    return SO101Scene(COLORS[0])


class Demonstrations:
    """See `collect.py`."""

    dataset = DATASET
    defaults = {"draw_every": 8}
    counts = {"scenes": 1}

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--scenes", type=int, default=10_000, help="each with all three instructions (10,000)")

    def __init__(self, args: argparse.Namespace):
        self.draw_every = args.draw_every
        self.parts = [f"scene-{number:06d}" for number in range(args.scenes)]
        self.options = {"policy": args.policy}

    def play(self, part: str) -> list[dict]:
        """The demonstrations of one scene that succeed."""
        logging.getLogger("so101_nexus").setLevel(logging.ERROR)
        checkpoint, scene, episodes = self.options["policy"], load_scene(), []
        policy = None if checkpoint is None else load_once(checkpoint)
        seed = (FIRST_SEED if policy is None else FIRST_CORRECTION) + int(part.removeprefix("scene-"))
        start = random_start(scene, seed)
        lead_ins = np.random.default_rng((seed, 1)).integers(LEAD_IN, size=len(COLORS))  # whatever the start
        scene.reset(seed, start)
        first_images = scene.images() if policy is None else None
        for color, lead_in in zip(COLORS, lead_ins.tolist(), strict=True):
            scene.task = color
            scene.reset(seed, start)
            if policy is not None and play_policy(scene, policy, lead_in, TASKS[color]):
                continue
            episode = demonstrate(scene, self.draw_every, first_images)
            if episode is not None:
                episodes.append(episode | {"task": TASKS[color]})
        return episodes
