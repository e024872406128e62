"""Pretraining of SO-101's vision tower: locate fingertips and cubes in the images of both cameras.

It learns from the frames of the demonstrations, whose `observation.environment_state` has the positions. In an image
of the front camera it finds them on the table; in one of the wrist camera, the visible cubes as seen from the gripper.
"""

import argparse
import math

import numpy as np
import torch
from training_runs import EpochDataset, naming_option

from smolandfast.training import LeRobotChunkDataset

from .simulator import COLORS, IMAGE_KEYS, TASKS, WRIST_FOV, SO101Scene, cube_poses
from .variation import (
    MAX_ANGLE,
    RECOLOR_PROBABILITY,
    draw_angle,
    draw_order,
    recolor_image,
    turn_image,
    turn_positions,
)

METRES = 0.1  # a unit of the predictions
NUM_FRONT, NUM_CUBE = 3 * (1 + len(COLORS)), 5
NUM_WRIST = NUM_CUBE * len(COLORS)
ANGLE_WEIGHT = 0.2  # of a cube's angle in the loss, against its position


class Labels:
    """Labels of images: those of the front camera, then those of the wrist camera. NaN labels are ignored."""

    def __init__(self):
        self.scene = SO101Scene(next(iter(TASKS)))
        self.scene.reset(0)

    def front(self, poses: np.ndarray) -> np.ndarray:
        """Positions of the fingertips and the cubes in metres `(12,)`, from [`SO101Scene.poses`]."""
        return np.concatenate([poses[:3], cube_poses(poses)[:, :3].ravel()])

    def wrist(self, state: np.ndarray, poses: np.ndarray) -> np.ndarray:
        """Of each cube the position in the gripper's frame, in metres, and cosine and sine of four times its angle.

        Args:
            state: `(6,)`, which places the gripper.

        Returns:
            `(15,)`. All are NaN of a cube outside of the image.
        """
        axes, tips, camera_axes, camera = self.scene.gripper_view(state)
        labels, turned = np.full((len(COLORS), NUM_CUBE), np.nan), np.arctan2(axes[1, 0], axes[0, 0])
        for label, cube in zip(labels, cube_poses(poses), strict=True):
            right, up, back = (cube[:3] - camera) @ camera_axes
            if back < 0 and max(abs(right), abs(up)) < -back * math.tan(math.radians(WRIST_FOV / 2)):
                angle = 4 * (2 * np.arctan2(cube[6], cube[3]) - turned)  # a quarter turn looks the same
                label[:] = [*(cube[:3] - tips) @ axes, METRES * np.cos(angle), METRES * np.sin(angle)]
        return labels.ravel()


class Images(EpochDataset):
    """The images of some frames, first those of the front camera, with their labels `(27,)`.

    With a `seed`, cubes swap their colours and front images are turned, another way in every epoch.
    """

    def __init__(self, frames: LeRobotChunkDataset, rows: np.ndarray, labels: np.ndarray, seed: int | None = None):
        super().__init__()
        self.frames, self.rows, self.labels, self.seed = frames, rows, labels, seed  # labels of `rows`: `(n, 27)`

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        camera, i = divmod(i, len(self.rows))
        labels = self.labels[i].copy()
        labels[slice(NUM_FRONT, None) if camera == 0 else slice(NUM_FRONT)] = np.nan
        image = self.frames.image(int(self.rows[i]), IMAGE_KEYS[camera])
        if self.seed is not None:
            rng = np.random.default_rng((self.seed, self.epoch, camera, i))
            angle, order = draw_angle(rng, MAX_ANGLE), draw_order(rng, RECOLOR_PROBABILITY)
            image = recolor_image(turn_image(image, angle) if camera == 0 else image, order)
            cubes = np.argsort(order)  # that now have the first, second and third colour
            tips, positions = np.split(turn_positions(labels[:NUM_FRONT].reshape(-1, 3), angle), [1])
            labels = np.concatenate(
                [tips, positions[cubes], labels[NUM_FRONT:].reshape(-1, NUM_CUBE)[cubes]], axis=None
            )
        return {"pixel_values": torch.from_numpy(image), "labels": torch.from_numpy(labels)}


class Pretraining:
    """See `pretrain_vision.py`."""

    num_labels = NUM_FRONT + NUM_WRIST
    kept = ""
    defaults = {"max_steps": 6_000}
    limits = {"sample_every": (1, math.inf), "held_out_episodes": (3, math.inf), "seed": (0, 2**32 - 1)}

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--dataset_root", required=True)
        parser.add_argument("--sample_every", type=int, default=8, help="steps from one used frame to the next (8)")
        parser.add_argument("--held_out_episodes", type=int, default=60, help="last demonstrations, to test (60)")

    def __init__(self, args: argparse.Namespace):
        with naming_option("--dataset_root"):
            frames = LeRobotChunkDataset(args.dataset_root, 1, image_keys=IMAGE_KEYS, cache_every=args.sample_every)
            poses = frames.vectors("observation.environment_state")
        rows = np.flatnonzero(frames.frame_index % args.sample_every == 0)
        first_held_out = frames.episode_starts[-args.held_out_episodes :][0]
        if first_held_out == 0:
            raise ValueError(f"--held_out_episodes is {args.held_out_episodes}, and there are no more. Lower it.")
        make = Labels()
        labels = [[*make.front(poses[i]), *make.wrist(frames.states[i], poses[i])] for i in rows]
        labels = np.array(labels, dtype=np.float32)
        is_trained = rows < first_held_out
        seen = ~np.isnan(labels[is_trained])
        self.mean = np.nansum(labels[is_trained], axis=0) / np.maximum(seen.sum(axis=0), 1)
        self.sets = (
            Images(frames, rows[is_trained], labels[is_trained], args.seed),
            Images(frames, rows[~is_trained], labels[~is_trained]),
        )

    def make_sets(self) -> tuple[Images, Images]:
        return self.sets

    def loss(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = ((labels - torch.from_numpy(self.mean).to(labels)) / METRES).nan_to_num()
        weights = (~labels.isnan()).float()
        weights[:, NUM_FRONT:].view(-1, len(COLORS), NUM_CUBE)[..., 3:] *= ANGLE_WEIGHT
        return ((predictions - targets) ** 2 * weights).sum() / weights.sum()

    def metrics(self, prediction) -> dict[str, float]:
        """Median and 90th percentile of the distances between positions and their labels, in millimetres."""
        errors = 1000 * (prediction.predictions * METRES + self.mean - prediction.label_ids)
        front = np.linalg.norm(errors[:, :NUM_FRONT].reshape(-1, 1 + len(COLORS), 3), axis=2)
        wrist = np.linalg.norm(errors[:, NUM_FRONT:].reshape(-1, len(COLORS), NUM_CUBE)[..., :3], axis=2)
        metrics = {}
        for name, distances in (("fingertips", front[:, 0]), ("cubes", front[:, 1:]), ("cubes_from_wrist", wrist)):
            metrics[f"{name}_mm"] = float(np.nanmedian(distances))
            metrics[f"{name}_p90_mm"] = float(np.nanquantile(distances, 0.9))
        return metrics
