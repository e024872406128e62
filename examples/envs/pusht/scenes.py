"""PushT scenes: rendered at random poses; turned, mirrored or shifted as a whole to augment demonstrations.

A scene is a 96x96 image and points in the simulator's coordinates, [0, 512]^2 with y downwards.
"""

from functools import partial
from typing import Any

import gymnasium
import numpy as np
from PIL import Image

from envs import Move, shift_image

from .simulator import ENV_ID, IMAGE_SIZE, WORLD_SIZE

# Two points that define the T's pose, in its own frame: middle of the bar, end of the stem.
T_POINTS = ((0.0, 15.0), (0.0, 120.0))
NUM_POINTS = 1 + 2 * len(T_POINTS)  # the agent, the T, the target
# The symmetry of the square that keeps PushT's target in place: a mirror at the target's axis.
TARGET_SYMMETRY = 7


def render_scenes(num_scenes: int, seed: int, near_target: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Render PushT at random poses; in half of the scenes the agent is near the T.

    Args:
        near_target: Share of scenes in which the T is near its target.

    Returns:
        Images `(num_scenes, 96, 96, 3)` uint8 and points `(num_scenes, 5, 2)` float32: the agent, the T's bar and
        stem end, the target's bar and stem end.
    """
    env = gymnasium.make(ENV_ID, obs_type="pixels_agent_pos").unwrapped
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    images = np.empty((num_scenes, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    points = np.empty((num_scenes, NUM_POINTS, 2), dtype=np.float32)
    target = env.get_goal_pose_body(env.goal_pose)
    for i in range(num_scenes):
        if rng.random() < near_target:
            position = env.goal_pose[:2] + rng.normal(0, 25, 2)
            angle = env.goal_pose[2] + rng.normal(0, 0.3)
        else:
            position, angle = rng.uniform(80, 430, 2), rng.uniform(-np.pi, np.pi)
        agent = position + rng.normal(0, 70, 2) if rng.random() < 0.5 else rng.uniform(20, 492, 2)
        env.agent.position = tuple(np.clip(agent, 20, 492))
        env.block.position, env.block.angle = tuple(position), angle
        for body in (env.agent, env.block):  # pymunk would move the drawn shapes only at its next step
            env.space.reindex_shapes_for_body(body)
        corners = [body.local_to_world(point) for body in (env.block, target) for point in T_POINTS]
        images[i] = env.get_obs()["pixels"]
        points[i] = [env.agent.position, *corners]
    env.close()
    return images, points


def turn_points(points: np.ndarray, symmetry: int) -> np.ndarray:
    """Apply one of the square's eight symmetries to points `(..., 2)` in [0, 512]^2.

    Symmetry s swaps left and right if s >= 4, then makes s % 4 quarter turns anticlockwise, as `np.rot90` does.
    """
    x, y = points[..., 0], points[..., 1]
    if symmetry >= 4:
        x = WORLD_SIZE - x
    for _ in range(symmetry % 4):
        x, y = y, WORLD_SIZE - x
    return np.stack([x, y], axis=-1)


def turn_image(image: np.ndarray, symmetry: int) -> np.ndarray:
    """[`turn_points`] for an image `(96, 96, 3)`."""
    return np.rot90(image[:, ::-1] if symmetry >= 4 else image, symmetry % 4)


def rotate_points(points: np.ndarray, angle: float) -> np.ndarray:
    """Rotate points `(..., 2)` as `Image.rotate(angle)` rotates an image: degrees, anticlockwise on the screen."""
    sine, cosine = np.sin(np.radians(angle)), np.cos(np.radians(angle))
    return (points - WORLD_SIZE / 2) @ np.array([[cosine, -sine], [sine, cosine]]) + WORLD_SIZE / 2


def vary_scene(
    image: np.ndarray,
    points: np.ndarray,
    rng: np.random.Generator,
    turn_probability: float,
    max_shift: int,
    max_angle: float = 0.0,
    mirror_probability: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Turn, mirror and shift a scene as a whole. Returns a new image and new points.

    Args:
        image: `(96, 96, 3)` uint8.
        points: `(..., 2)` in [0, 512].
        turn_probability: Share of scenes that get one of the seven symmetries other than the identity.
        max_shift: Largest shift along each axis, in image pixels; the gap repeats the border.
        max_angle: Half of the scenes are also rotated about the centre, by up to this many degrees in either
            direction; the corners become white.
        mirror_probability: Share of scenes that are first mirrored at the target's axis, which keeps the task.
    """
    if mirror_probability and rng.random() < mirror_probability:
        image, points = turn_image(image, TARGET_SYMMETRY), turn_points(points, TARGET_SYMMETRY)
    symmetry = rng.integers(1, 8) if rng.random() < turn_probability else 0
    dx, dy = rng.integers(-max_shift, max_shift + 1, 2)
    image = shift_image(turn_image(image, symmetry), dx, dy)
    points = turn_points(points, symmetry) + np.array([dx, dy]) * (WORLD_SIZE / IMAGE_SIZE)
    if max_angle and rng.random() < 0.5:
        angle = rng.uniform(-max_angle, max_angle)
        image = np.array(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255)))
        points = rotate_points(points, angle)
    return image, points.astype(np.float32)


def vary_demonstration(sample: dict[str, Any], rng: np.random.Generator, **options: float) -> dict[str, Any]:
    """[`vary_scene`] for a sample of one image, with the pusher's position `(2,)` and target positions `(H, 2)`."""
    points = np.concatenate([sample["state"][None], sample["actions"]])
    image, points = vary_scene(sample["images"][0], points, rng, **options)
    return {**sample, "images": [image], "state": points[0], "actions": points[1:]}


def symmetries(mirror_probability: float, turn_probability: float, **others: float) -> list[Move]:
    """The symmetries, other than the identity, that demonstrations are varied by."""
    chosen = range(1, 8) if turn_probability > 0 else [TARGET_SYMMETRY] if mirror_probability > 0 else []
    return [partial(turn_points, symmetry=symmetry) for symmetry in chosen]


def rotations(max_angle: float, **others: float) -> list[Move]:
    """The largest rotations in both directions."""
    return [partial(rotate_points, angle=angle) for angle in (-max_angle, max_angle)] if max_angle > 0 else []
