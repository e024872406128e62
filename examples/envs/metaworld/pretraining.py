"""Pretraining of Meta-World's vision tower: locate hand, objects and goal in images of the fifty tasks.

It learns from the frames of the demonstrations, whose `observation.environment_state` has the positions, and from
scenes with other placements, rendered while the expert plays them.
"""

import argparse
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from evaluate import map_in_processes
from tqdm import tqdm
from training_runs import EpochDataset, make_own_folder, naming_option

from smolandfast.files_smolandfast import atomic_write
from smolandfast.training import LeRobotChunkDataset

from .simulator import IMAGE_SIZE, TASKS, MetaworldScene, shift_image, shift_points

FIRST_SEED, MAX_SCENES = 10_000_000, 10_000  # demonstrations and evaluations have lower seeds
# Of the 21 numbers of `MetaworldScene.poses`: hand, opening, positions of two objects and the goal.
LABELS = [0, 1, 2, 3, 4, 5, 6, 11, 12, 13, 18, 19, 20]
POINTS = {"hand": 0, "object": 4, "other": 7, "goal": 10}  # first of the three labels of each position
METRES = 0.1  # a unit of the predictions


def render_scenes(task: str, num_scenes: int, run: int, folder: Path) -> None:
    """Render one, mostly early, moment of each of `num_scenes` perturbed demonstrations of a task, into a file."""
    path = folder / f"{task}.npz"
    if path.exists():
        return
    scene, images, poses = MetaworldScene(task), [], []
    for i in range(num_scenes):
        seed = FIRST_SEED + (run * len(TASKS) + list(TASKS).index(task)) * MAX_SCENES + i
        rng = np.random.default_rng(seed)
        scene.reset(seed)
        shove, steps_left = np.zeros(3), 0
        for _ in range(1 + int(90 * rng.random() ** 2)):  # before the first step, many goals are rendered elsewhere
            if steps_left == 0 and rng.random() < 0.05:
                shove, steps_left = rng.uniform(-1, 1, 3), rng.integers(5, 20)
            action = scene.expert_action()
            if steps_left:
                action[:3], steps_left = shove, steps_left - 1
            scene.step(action)
        images += scene.images()
        poses.append(scene.poses)
    scene.close()
    with atomic_write(path) as unfinished, open(unfinished, "wb") as file:
        np.savez_compressed(file, images=np.array(images), poses=np.array(poses))


class Scenes(EpochDataset):
    """Scenes, then frames of the demonstrations, shifted by up to `max_shift` pixels, another way in every epoch."""

    def __init__(self, images, labels, frames: LeRobotChunkDataset | None = None, indices=(), max_shift=0):
        super().__init__()
        self.images, self.labels, self.max_shift = images, labels, max_shift
        self.frames, self.indices = frames, indices

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        first_frame = len(self.images)
        image = self.images[i] if i < first_frame else self.frames.image(self.indices[i - first_frame])
        labels = self.labels[i].copy()
        if self.max_shift:
            shift = np.random.default_rng((self.epoch, i)).integers(-self.max_shift, self.max_shift + 1, 2)
            image = shift_image(image, *shift)
            for first in POINTS.values():
                point = labels[first : first + 3]
                point[:] = shift_points(point, *shift) if point.any() else 0  # zeros where the task has no such object
        return {"pixel_values": torch.from_numpy(image), "labels": torch.from_numpy(labels)}


class Pretraining:
    """See `pretrain_vision.py`."""

    num_labels = len(LABELS)
    defaults = {"max_steps": 4_000}
    limits = {"num_scenes": (2, MAX_SCENES), "max_shift": (0, IMAGE_SIZE - 1), "seed": (0, 2**32 - 1)}
    limits |= {"sample_every": (1, math.inf), "num_processes": (1, math.inf)}

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--dataset_root", required=True)
        parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", default=list(TASKS))
        parser.add_argument("--num_scenes", type=int, default=400, help="other placements of each task (400)")
        parser.add_argument("--sample_every", type=int, default=1, help="steps from one used frame to the next (1)")
        parser.add_argument("--max_shift", type=int, default=0, help="largest shift of an image, in pixels (0)")
        parser.add_argument("--num_processes", type=int, default=os.cpu_count(), help="for rendering")

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, Path(f"{args.output_dir}.scenes")
        self.kept = f"The scenes drawn so far are kept in {self.folder}."
        with naming_option("--output_dir"):
            make_own_folder(self.folder, ["*.npz", ".*.npz.*"])  # the last are unfinished files
        with naming_option("--dataset_root"):
            self.frames = LeRobotChunkDataset(args.dataset_root, 1, cache_every=args.sample_every)
            self.frame_labels = self.frames.vectors("observation.environment_state")[:, LABELS]

    def make_sets(self) -> tuple[Scenes, Scenes]:
        args, folder = self.args, self.folder
        render = partial(render_scenes, num_scenes=args.num_scenes, run=args.seed, folder=folder)
        with PartialState().main_process_first():
            done = map_in_processes(args.num_processes, render, args.tasks)
            list(tqdm(done, total=len(args.tasks), unit="task"))
        parts = [np.load(folder / f"{task}.npz") for task in args.tasks]
        images = np.concatenate([part["images"] for part in parts])
        labels = np.concatenate([part["poses"] for part in parts])[:, LABELS]
        ranks = np.concatenate([np.arange(len(part["poses"])) / len(part["poses"]) for part in parts])
        held_out = ranks < max(0.05, 2 / args.num_scenes)
        self.means = labels.mean(axis=0)
        indices = np.flatnonzero(self.frames.frame_index % args.sample_every == 0)
        all_labels = np.concatenate([labels[~held_out], self.frame_labels[indices]])
        trained = Scenes(images[~held_out], all_labels, self.frames, indices, args.max_shift)
        return trained, Scenes(images[held_out], labels[held_out])

    def loss(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = (labels - torch.from_numpy(self.means).to(labels)) / METRES
        return ((predictions - targets) ** 2).mean()

    def metrics(self, prediction) -> dict[str, float]:
        """Median distance between each position and its label, in millimetres, where the object exists."""
        positions, labels, metrics = prediction.predictions * METRES + self.means, prediction.label_ids, {}
        for name, first in POINTS.items():
            exists = np.abs(labels[:, first : first + 3]).sum(axis=1) > 0
            errors = np.linalg.norm(positions[exists, first : first + 3] - labels[exists, first : first + 3], axis=1)
            if not exists.any():
                continue
            metrics[f"{name}_mm"] = 1000 * float(np.median(errors))
            metrics[f"{name}_p90_mm"] = 1000 * float(np.quantile(errors, 0.9))
        return metrics
