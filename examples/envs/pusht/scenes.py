"""PushT scenes: rendered at random poses, and turned, mirrored or shifted as a whole.

A scene is a 96x96 image and points in the simulator's coordinates, [0, 512]^2 with y downwards. Moving both together
gives another valid scene, so each demonstration stands for many.
"""

from functools import partial

import gymnasium
import numpy as np
from PIL import Image

from envs import Move

from .simulator import ENV_ID, IMAGE_SIZE, WORLD_SIZE

# Points that determine the T's pose, in its own frame: middle of the bar, end of the stem.
T_POINTS = ((0.0, 15.0), (0.0, 120.0))
NUM_POINTS = 1 + 2 * len(T_POINTS)  # the agent, the T, the target
# The symmetry of the square that keeps PushT's target in place: it mirrors about the target's own axis.
TARGET_SYMMETRY = 7


def render_scenes(num_scenes: int, seed: int, near_target: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Render PushT at random poses; in half of the scenes the agent is near the T.

    Args:
        near_target: Share of scenes in which the T lies near its target, where precision counts.

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
        for body in (env.agent, env.block):  # else pymunk moves the shapes, which are drawn, only at its next step
            env.space.reindex_shapes_for_body(body)
        corners = [body.local_to_world(point) for body in (env.block, target) for point in T_POINTS]
        images[i] = env.get_obs()["pixels"]
        points[i] = [env.agent.position, *corners]
    env.close()
    return images, points


def turn_points(points: np.ndarray, symmetry: int) -> np.ndarray:
    """Move points `(..., 2)` in [0, 512]^2 by one of the square's eight symmetries.

    Symmetry s swaps left and right if s >= 4, then makes s % 4 quarter turns anticlockwise, like `np.rot90`.
    """
    x, y = points[..., 0], points[..., 1]
    if symmetry >= 4:
        x = WORLD_SIZE - x
    for _ in range(symmetry % 4):
        x, y = y, WORLD_SIZE - x
    return np.stack([x, y], axis=-1)


def turn_image(image: np.ndarray, symmetry: int) -> np.ndarray:
    """Move an image `(96, 96, 3)` as [`turn_points`] moves points."""
    return np.rot90(image[:, ::-1] if symmetry >= 4 else image, symmetry % 4)


def rotate_points(points: np.ndarray, angle: float) -> np.ndarray:
    """Move points `(..., 2)` as `Image.rotate(angle)` moves their image: degrees, anticlockwise on the screen."""
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
    """Turn, mirror and shift a scene as a whole.

    Args:
        image: `(96, 96, 3)` uint8.
        points: `(..., 2)`, [0, 512].
        turn_probability: Share of scenes that get one of the seven symmetries other than the identity.
        max_shift: Largest shift along each axis, in image pixels. The gap is filled with the border's pixels.
        max_angle: Half of the scenes are also rotated about the centre, by up to this many degrees either way. The
            corners are filled with white.
        mirror_probability: Share of scenes that are first mirrored about the target's axis. The task stays the same,
            so 0.5 doubles the demonstrations.

    Returns:
        A new image and new points of the same shapes.
    """
    if mirror_probability and rng.random() < mirror_probability:
        image, points = turn_image(image, TARGET_SYMMETRY), turn_points(points, TARGET_SYMMETRY)
    symmetry = rng.integers(1, 8) if rng.random() < turn_probability else 0
    dx, dy = rng.integers(-max_shift, max_shift + 1, 2)
    image = turn_image(image, symmetry)
    rows, columns = (np.clip(np.arange(IMAGE_SIZE) - shift, 0, IMAGE_SIZE - 1) for shift in (dy, dx))
    image = image[rows[:, None], columns]
    points = turn_points(points, symmetry) + np.array([dx, dy]) * (WORLD_SIZE / IMAGE_SIZE)
    if max_angle and rng.random() < 0.5:
        angle = rng.uniform(-max_angle, max_angle)
        image = np.array(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255)))
        points = rotate_points(points, angle)
    return image, points.astype(np.float32)


def vary_demonstration(
    image: np.ndarray, state: np.ndarray, actions: np.ndarray, rng: np.random.Generator, **options: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[`vary_scene`] of an image, the pusher's place `(2,)` and the places that it is drawn to `(H, 2)`."""
    image, points = vary_scene(image, np.concatenate([state[None], actions]), rng, **options)
    return image, points[0], points[1:]


def symmetries(mirror_probability: float, turn_probability: float, **others: float) -> list[Move]:
    """The symmetries of the square, other than the identity, that demonstrations are varied by."""
    chosen = range(1, 8) if turn_probability > 0 else [TARGET_SYMMETRY] if mirror_probability > 0 else []
    return [partial(turn_points, symmetry=symmetry) for symmetry in chosen]


def rotations(max_angle: float, **others: float) -> list[Move]:
    """The rotations furthest from the demonstrations."""
    return [partial(rotate_points, angle=angle) for angle in (-max_angle, max_angle)] if max_angle > 0 else []
