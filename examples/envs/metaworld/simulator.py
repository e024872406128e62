"""The simulator of Meta-World's fifty tasks (v3; Yu et al. 2019, arXiv 1910.10897), set up as in LeRobot.

An action moves the hand by up to a centimetre along each axis; its fourth number opens (-1) or closes (1) the gripper.
The state is the hand's position in metres and the gripper's opening in [0, 1]. Object and goal are placed at random.
An episode ends with its first success, or after 500 steps at 80 Hz.

Needs `metaworld` and, without a screen, Debian's `libosmesa6` with `MUJOCO_GL=osmesa`.
"""

import functools
import warnings
from typing import Any

import metaworld
import numpy as np
from metaworld.policies import ENV_POLICY_MAP
from PIL import Image

from envs import FRAME_SIZE, shift_image
from envs.rendering import Renderer, fast_renderer

MAX_EPISODE_STEPS = 500
CONTROL_HZ = 80
ACTION_DIM = STATE_DIM = 4
IMAGE_SIZE = 128  # pixels along each side of the policy's images
# LeRobot's camera: its position in metres, the directions of its image's axes, and its focal length in our pixels.
CAMERA = np.array([0.75, 0.075, 0.7])
RIGHT, DOWN = np.array([0.5499, 0.8332, -0.0584]), np.array([0.3762, -0.3095, -0.8733])
FORWARD = np.cross(RIGHT, DOWN)
FOCAL_LENGTH = IMAGE_SIZE / 2 / np.tan(np.deg2rad(60) / 2)
# Sides in metres of the cells of `rendering.simplified`; a pixel of the policy's images is about eight millimetres.
ARM_MESHES = dict.fromkeys(("pedestal", "base", "head", *(f"l{i}" for i in range(7))), 0.01) | {"eGripperBase": 0.005}
# Instructions and difficulties of LeRobot's `metaworld_config.json` (release 0.6.1).
INSTRUCTIONS = {
    "easy": {
        "button-press": "Press a button",
        "button-press-topdown": "Press a button from the top",
        "button-press-topdown-wall": "Bypass a wall and press a button from the top",
        "button-press-wall": "Bypass a wall and press a button",
        "coffee-button": "Push a button on the coffee machine",
        "dial-turn": "Rotate a dial 180 degrees",
        "door-close": "Close a door with a revolving joint",
        "door-lock": "Lock the door by rotating the lock clockwise",
        "door-open": "Open a door with a revolving joint",
        "door-unlock": "Unlock the door by rotating the lock counter-clockwise",
        "drawer-close": "Push and close a drawer",
        "drawer-open": "Open a drawer",
        "faucet-close": "Rotate the faucet clockwise",
        "faucet-open": "Rotate the faucet counter-clockwise",
        "handle-press": "Press a handle down",
        "handle-press-side": "Press a handle down sideways",
        "handle-pull": "Pull a handle up",
        "handle-pull-side": "Pull a handle up sideways",
        "lever-pull": "Pull a lever down 90 degrees",
        "peg-unplug-side": "Unplug a peg sideways",
        "plate-slide": "Slide a plate into a cabinet",
        "plate-slide-back": "Get a plate from the cabinet",
        "plate-slide-back-side": "Get a plate from the cabinet sideways",
        "plate-slide-side": "Slide a plate into a cabinet sideways",
        "reach": "Reach a goal position",
        "reach-wall": "Bypass a wall and reach a goal",
        "window-close": "Push and close a window",
        "window-open": "Push and open a window",
    },
    "medium": {
        "basketball": "Dunk the basketball into the basket",
        "bin-picking": "Grasp the puck from one bin and place it into another bin",
        "box-close": "Grasp the cover and close the box with it",
        "coffee-pull": "Pull a mug from a coffee machine",
        "coffee-push": "Push a mug under a coffee machine",
        "hammer": "Hammer a screw on the wall",
        "peg-insert-side": "Insert a peg sideways",
        "push-wall": "Bypass a wall and push a puck to a goal",
        "soccer": "Kick a soccer into the goal",
        "sweep": "Sweep a puck off the table",
        "sweep-into": "Sweep a puck into a hole",
    },
    "hard": {
        "assembly": "Pick up a nut and place it onto a peg",
        "hand-insert": "Insert the gripper into a hole",
        "pick-out-of-hole": "Pick up a puck from a hole",
        "pick-place": "Pick and place a puck to a goal",
        "push": "Push the puck to a goal",
        "push-back": "Push the puck to a goal",
    },
    "very_hard": {
        "disassemble": "Pick a nut out of a peg",
        "pick-place-wall": "Pick a puck, bypass a wall and place the puck",
        "shelf-place": "Pick and place a puck onto a shelf",
        "stick-pull": "Grasp a stick and pull a box with the stick",
        "stick-push": "Grasp a stick and push a box using the stick",
    },
}
TASKS = {task: instruction for group in INSTRUCTIONS.values() for task, instruction in group.items()}
DIFFICULTIES = {task: difficulty for difficulty, group in INSTRUCTIONS.items() for task in group}
MT10 = ("reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close")
MT10 += ("button-press-topdown", "peg-insert-side", "window-open", "window-close")


def shift_points(points: np.ndarray, right: int, down: int) -> np.ndarray:
    """Move points `(..., 3)` in metres as [`shift_image`] moves their image, at the same depth."""
    depths = (points - CAMERA) @ FORWARD
    return (points + depths[..., None] * (right * RIGHT + down * DOWN) / FOCAL_LENGTH).astype(np.float32)


def vary_demonstration(sample: dict[str, Any], rng: np.random.Generator, max_shift: int) -> dict[str, Any]:
    """Move image and state of a sample sideways by up to `max_shift` pixels; heights stay the same.

    Actions stay as they are: a pixel is about a centimetre, and would turn them by half a degree.
    """
    right, state = int(rng.integers(-max_shift, max_shift + 1)), sample["state"]
    state = np.append(shift_points(state[:3], right, 0), state[3:])
    return {**sample, "images": [shift_image(sample["images"][0], right, 0)], "state": state}


@functools.cache
def _make_benchmark(name: str) -> metaworld.MT1:
    return metaworld.MT1(name, seed=42)  # takes a second


class MetaworldScene:
    """A [`envs.Scene`] of one task, seen by LeRobot's camera.

    Args:
        task: A key of `TASKS`.
        full_render: Render as LeRobot does, 480 pixels a side, smoothed, with sharp shadows and reflections. The
            default is 256 pixels with coarse shadows and an arm of fewer triangles, seven times as fast. Both are
            reduced to 128.
    """

    def __init__(self, task: str, full_render: bool = False):
        if task not in TASKS:
            raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}.")
        self.task, self.full_render = task, full_render
        name = f"{task}-v3"
        benchmark = _make_benchmark(name)
        self.env = benchmark.train_classes[name]()
        self.env.set_task(benchmark.train_tasks[0])
        self.env.model.camera("corner2").pos = CAMERA
        self.env.reset()
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True  # as LeRobot does; there is no public API
        self.expert = ENV_POLICY_MAP[name]()
        self._renderers: dict[int, Renderer] = {}  # by size in pixels

    def reset(self, seed: int) -> np.ndarray:
        """Place object and goal at random; returns the simulator's observation `(39,)`."""
        self.env.seed(seed)
        self.observation, _ = self.env.reset(seed=seed)
        return self.observation

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Execute one action `(4,)`, clipped to [-1, 1]; returns reward, success, and whether the time is over."""
        action = np.clip(action, -1, 1).astype(np.float32)
        self.observation, reward, _, truncated, info = self.env.step(action)
        return float(reward), bool(info["success"]), bool(truncated)

    def expert_action(self) -> np.ndarray:
        """The action of Meta-World's scripted policy, which knows all positions: float32 `(4,)` in [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of each action that is clipped here
            return np.clip(self.expert.get_action(self.observation), -1, 1).astype(np.float32)

    @property
    def state(self) -> np.ndarray:
        """Float32 `(4,)`: the hand's position in metres, the gripper's opening in [0, 1]."""
        return self.observation[:STATE_DIM].astype(np.float32)

    @property
    def poses(self) -> np.ndarray:
        """Float32 `(21,)`: hand, opening, position and quaternion of two objects (0 if the task has one), goal."""
        return np.concatenate([self.observation[:18], self.observation[36:]]).astype(np.float32)

    def images(self) -> list[np.ndarray]:
        image = Image.fromarray(self._render(480 if self.full_render else 256))
        return [np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))]

    def film(self) -> np.ndarray:
        return self._render(FRAME_SIZE)

    def _render(self, size: int) -> np.ndarray:
        if size not in self._renderers:
            model, is_full = self.env.model, self.full_render
            renderer = Renderer(model, size, size) if is_full else fast_renderer(model, size, ARM_MESHES, 512)
            self._renderers[size] = renderer
        self._renderers[size].update_scene(self.env.data, "corner2")
        return self._renderers[size].render()[::-1, ::-1]  # this camera is upside down

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self.env.close()
