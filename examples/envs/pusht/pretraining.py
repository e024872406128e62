"""Pretraining of PushT's vision tower: locate the pusher, the T and the target in scenes with random poses."""

import argparse
import math
from functools import partial

import numpy as np
import torch
from evaluate import map_in_processes
from training_runs import EpochDataset

from .scenes import NUM_POINTS, render_scenes, vary_scene
from .simulator import WORLD_SIZE

HARMONICS = 4  # of the T's angle, in the labels


def make_labels(points: np.ndarray) -> np.ndarray:
    """The numbers to predict from an image: `(5, 2)` points -> `(18,)`.

    The points, in [-1, 1]; then cosine and sine of one to four times the T's angle. From the points alone, the angle
    is learnt late: knowing it up to half or a third of a turn does not lower their error, but it lowers that of the
    second or third harmonic.
    """
    x, y = points[2] - points[1]
    angles = np.arctan2(y, x) * np.arange(1, HARMONICS + 1)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([points.ravel() / (WORLD_SIZE / 2) - 1, directions.ravel()]).astype(np.float32)


class Scenes(EpochDataset):
    """Scenes and their labels, varied in another way in every epoch."""

    def __init__(self, images: np.ndarray, points: np.ndarray, seed: int):
        super().__init__()
        self.images, self.points, self.seed = images, points, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, self.epoch, i))
        options = {"turn_probability": 0.5, "max_shift": 6, "max_angle": 15}
        image, points = vary_scene(self.images[i], self.points[i], rng, **options)
        return {"pixel_values": torch.from_numpy(image), "labels": torch.from_numpy(make_labels(points))}


class Pretraining:
    """See `pretrain_vision.py`."""

    num_labels = NUM_POINTS * 2 + HARMONICS * 2
    kept = ""  # a sentence about what an interrupted run keeps besides checkpoints
    defaults = {"max_steps": 6_000}
    limits = {"num_scenes": (2, math.inf), "near_target": (0, 1), "seed": (0, 2**32 - 2)}

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--num_scenes", type=int, default=40_000)
        parser.add_argument("--near_target", type=float, default=0.3, help="share with the T near its target")

    def __init__(self, args: argparse.Namespace):
        self.args = args

    def make_sets(self) -> tuple[Scenes, Scenes]:
        args = self.args
        render = partial(render_scenes, args.num_scenes // 2, near_target=args.near_target)
        parts = map_in_processes(2, render, [args.seed, args.seed + 1])
        images, points = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        held_out = max(args.num_scenes // 60, 1)
        trained, tested = slice(held_out, None), slice(held_out)
        return tuple(Scenes(images[part], points[part], args.seed) for part in (trained, tested))

    def loss(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        errors = (predictions - labels) ** 2
        return 10 * errors[:, : NUM_POINTS * 2].mean() + errors[:, NUM_POINTS * 2 :].mean()

    def metrics(self, prediction) -> dict[str, float]:
        """Mean distance between each point's prediction and its label, in the simulator's pixels (512 a side)."""
        errors = (prediction.predictions - prediction.label_ids)[:, : NUM_POINTS * 2]
        distances = np.linalg.norm(errors.reshape(-1, NUM_POINTS, 2) * (WORLD_SIZE / 2), axis=2).mean(axis=0)
        agent, bar, stem, *target = distances
        return {"agent_px": agent, "bar_px": bar, "stem_px": stem, "target_px": np.mean(target)}
