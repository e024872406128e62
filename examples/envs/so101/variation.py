"""Demonstrations of SO-101 turned about the axis of the shoulder's pan, which is vertical, and with other colours.

The front camera looks straight down, so its image turns as the scene does: within a pixel on the table, less exactly
above it. What the wrist camera sees stays the same. Where cubes swap their colours, the instruction
names the new colour of the same cube.
"""

from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from envs import Move

from .simulator import COLORS, FRONT_CAMERA, FRONT_FOV, IMAGE_SIZE, TASKS

MAX_ANGLE, RECOLOR_PROBABILITY = 15.0, 0.8  # by default
PAN_AXIS = np.array([0.0388353, 0.0])  # of the simulator's arm: x and y in metres
MARGIN = IMAGE_SIZE // 2  # pixels by which an image's edge is repeated before it is turned
CHANNELS = np.array([("red", "green", "blue").index(color) for color in COLORS])
PIXELS_PER_METRE = IMAGE_SIZE / (2 * FRONT_CAMERA["distance"] * np.tan(np.radians(FRONT_FOV / 2)))  # on the table


def turn_image(image: np.ndarray, angle: float) -> np.ndarray:
    """A front image `(128, 128, 3)` of the scene that is turned with the arm by `angle` degrees of pan."""
    if angle == 0:
        return image
    # In the image, x points up and y to the left.
    up, left = PIXELS_PER_METRE * (PAN_AXIS - FRONT_CAMERA["lookat"][:2])
    centre = MARGIN + IMAGE_SIZE / 2 - left, MARGIN + IMAGE_SIZE / 2 - up
    padded = Image.fromarray(np.pad(image, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="edge"))
    turned = padded.rotate(-angle, Image.Resampling.BILINEAR, center=centre)
    return np.array(turned.crop((MARGIN, MARGIN, MARGIN + IMAGE_SIZE, MARGIN + IMAGE_SIZE)))


def turn_positions(positions: np.ndarray, angle: float) -> np.ndarray:
    """Positions `(..., 3)` in metres after that turn: pan is clockwise, seen from above."""
    sine, cosine = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    turned = (positions[..., :2] - PAN_AXIS) @ np.array([[cosine, -sine], [sine, cosine]]) + PAN_AXIS
    return np.concatenate([turned, positions[..., 2:]], axis=-1)


def turn_joints(joints: np.ndarray, angle: float) -> np.ndarray:
    """States or actions `(..., 6)` after that turn."""
    return np.concatenate([joints[..., :1] + np.float32(angle), joints[..., 1:]], axis=-1)


def recolor_image(image: np.ndarray, order: np.ndarray) -> np.ndarray:
    """An image in which each cube of `COLORS[i]` is of `COLORS[order[i]]`: pixels of one dominant channel."""
    source = np.empty(3, dtype=int)  # the channel that each channel is taken from
    source[CHANNELS[order]] = CHANNELS
    _, middle, high = np.moveaxis(np.sort(image, axis=-1).astype(int), -1, 0)
    return np.where((high - middle > 25)[..., None], image[..., source], image)


def draw_angle(rng: np.random.Generator, max_angle: float) -> float:
    """0 for half of the samples."""
    return rng.uniform(-max_angle, max_angle) if rng.random() < 0.5 else 0.0


def draw_order(rng: np.random.Generator, recolor_probability: float) -> np.ndarray:
    return rng.permutation(len(COLORS)) if rng.random() < recolor_probability else np.arange(len(COLORS))


def vary_demonstration(
    sample: dict[str, Any], rng: np.random.Generator, max_angle: float, recolor_probability: float
) -> dict[str, Any]:
    """Turn and recolour the images of both cameras, with state `(6,)`, actions `(H, 6)` and the instruction."""
    angle, order = draw_angle(rng, max_angle), draw_order(rng, recolor_probability)
    front, wrist = sample["images"]
    color = next((color for color, task in TASKS.items() if task == sample["text"]), None)
    if color is None:
        fix = "Name demonstrations of `collect.py --benchmark so101`."
        raise ValueError(
            f"A demonstration's task is {sample['text']!r}, expected one of {list(TASKS.values())}. {fix}"
        )
    return {
        **sample,
        "images": [recolor_image(turn_image(front, angle), order), recolor_image(wrist, order)],
        "text": TASKS[COLORS[order[COLORS.index(color)]]],
        "state": turn_joints(sample["state"], angle),
        "actions": turn_joints(sample["actions"], angle),
    }


def turns(max_angle: float, **others: float) -> list[Move]:
    """The largest turns in both directions."""
    return [partial(turn_joints, angle=angle) for angle in (-max_angle, max_angle)] if max_angle > 0 else []
