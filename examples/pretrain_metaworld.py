"""Pretrain the tiny vision tower on Meta-World: find hand, objects and goal in pictures of the fifty tasks.

    python examples/pretrain_metaworld.py --dataset_root outputs/metaworld --output_dir outputs/metaworld-vision

Learns from the frames of the demonstrations, whose `observation.environment_state` has the positions, and from scenes
with other placements, drawn while the expert plays them; their actions are not used. Writes `vision.safetensors` for
`train.py --vision_weights`. A run that was interrupted continues when the same command is given again.
"""

import argparse
import math
import multiprocessing
import os
from functools import partial
from pathlib import Path

import interrupt  # noqa: F401 - before all that takes long
import numpy as np
import torch
from accelerate import PartialState
from metaworld_tasks import BENCHMARK, IMAGE_SIZE, TASKS, MetaworldScene, shift_picture, shift_points
from pretrain_vision import OUTPUTS, SaveVision, load_vision, save_vision
from pusht_scenes import EpochSetter
from torch import nn
from tqdm import tqdm
from training_runs import (
    EpochDataset,
    check_numbers,
    interruption,
    keep_options,
    make_own_folder,
    naming_option,
    process_pool,
)
from transformers import TrainingArguments

from smolandfast.files_smolandfast import atomic_write
from smolandfast.training import (
    AtomicCheckpointTrainer,
    LeRobotChunkDataset,
    bf16_is_faster,
    make_muon,
    make_tiny_vision,
)

FIRST_SEED, MAX_SCENES = 10_000_000, 10_000  # demonstrations and evaluations have lower seeds
# Of the 21 numbers of `MetaworldScene.poses`: hand, opening, positions of two objects and the goal.
LABELS = [0, 1, 2, 3, 4, 5, 6, 11, 12, 13, 18, 19, 20]
POINTS = {"hand": 0, "object": 4, "other": 7, "goal": 10}  # where each one's place begins among the labels
METRES = 0.1  # one unit of the labels


def render_scenes(task: str, num_scenes: int, run: int, folder: Path) -> None:
    """Draw one moment of each of `num_scenes` shoved demonstrations of a task, into a file; most are early ones."""
    path = folder / f"{task}.npz"
    if path.exists():
        return
    scene, images, poses = MetaworldScene(task), [], []
    for i in range(num_scenes):
        seed = FIRST_SEED + (run * len(TASKS) + list(TASKS).index(task)) * MAX_SCENES + i
        rng = np.random.default_rng(seed)
        scene.reset(seed)
        shove, steps_left = np.zeros(3), 0
        for _ in range(1 + int(90 * rng.random() ** 2)):  # before the first step many goals are drawn elsewhere
            if steps_left == 0 and rng.random() < 0.05:
                shove, steps_left = rng.uniform(-1, 1, 3), rng.integers(5, 20)
            action = scene.expert_action()
            if steps_left:
                action[:3], steps_left = shove, steps_left - 1
            scene.step(action)
        images.append(scene.image())
        poses.append(scene.poses)
    scene.close()
    with atomic_write(path) as unfinished, open(unfinished, "wb") as file:
        np.savez_compressed(file, images=np.array(images), poses=np.array(poses))


class PoseRegressor(nn.Module):
    """The vision tower and connector of the tiny model, with a linear layer that predicts the labels."""

    def __init__(self, vision_model: nn.Module, connector: nn.Module, num_features: int):
        super().__init__()
        self.vision_model = vision_model
        self.connector = connector
        self.head = nn.Linear(num_features, len(LABELS))
        self.register_buffer("means", torch.zeros(len(LABELS)), persistent=False)  # of the labels

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 `(B, 128, 128, 3)` and labels `(B, 13)` in metres -> loss and predictions in metres."""
        pixels = pixel_values.permute(0, 3, 1, 2).float() / 127.5 - 1  # as the processor normalises
        tokens = self.connector(self.vision_model(pixels).last_hidden_state)
        predictions = self.head(tokens.flatten(1)).float()
        targets = (labels - self.means) / METRES
        return {"loss": ((predictions - targets) ** 2).mean(), "positions": predictions * METRES + self.means}


class Pictures(EpochDataset):
    """Scenes, then frames of the demonstrations, moved by up to `max_shift` pixels, another way in every epoch."""

    def __init__(
        self, images, labels, frames: LeRobotChunkDataset | None = None, frame_labels=(), indices=(), max_shift=0
    ):
        super().__init__()
        self.images, self.frames, self.indices, self.max_shift = images, frames, indices, max_shift
        self.labels = np.concatenate([labels, frame_labels[indices]]) if frames is not None else labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        known = len(self.images)
        image = self.images[i] if i < known else self.frames.image(self.indices[i - known])
        labels = self.labels[i].copy()
        if self.max_shift:
            shift = np.random.default_rng((self.epoch, i)).integers(-self.max_shift, self.max_shift + 1, 2)
            image = shift_picture(image, *shift)
            for first in POINTS.values():
                point = labels[first : first + 3]
                point[:] = shift_points(point, *shift) if point.any() else 0  # zeros: there is no such thing
        return {"pixel_values": torch.from_numpy(image), "labels": torch.from_numpy(labels)}


def mean_error(prediction) -> dict[str, float]:
    """Median distance between each position and its label, in millimetres, where the thing exists."""
    predictions, labels, metrics = prediction.predictions, prediction.label_ids, {}
    for name, first in POINTS.items():
        exists = np.abs(labels[:, first : first + 3]).sum(axis=1) > 0
        errors = np.linalg.norm(predictions[exists, first : first + 3] - labels[exists, first : first + 3], axis=1)
        if not exists.any():
            continue
        metrics[f"{name}_mm"] = 1000 * float(np.median(errors))
        metrics[f"{name}_p90_mm"] = 1000 * float(np.quantile(errors, 0.9))
    return metrics


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_root", required=True)
    parser.add_argument("--output_dir", default="outputs/metaworld-vision")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", default=list(TASKS))
    parser.add_argument("--num_scenes", type=int, default=400, help="other placements of each task (400)")
    parser.add_argument("--sample_every", type=int, default=1, help="steps from one used frame to the next (1)")
    parser.add_argument("--max_shift", type=int, default=0, help="pixels by which pictures are moved at most (0)")
    parser.add_argument("--max_steps", type=int, default=4_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--vision_weights", help="vision.safetensors or policy to continue from")
    parser.add_argument("--num_processes", type=int, default=os.cpu_count(), help="for drawing")
    parser.add_argument("--seed", type=int, default=0, help="another one has other placements (0)")
    args = parser.parse_args(argv)

    scenes = Path(f"{args.output_dir}.scenes")
    try:
        sizes = dict.fromkeys(("max_steps", "batch_size", "sample_every", "num_processes"), (1, math.inf))
        check_numbers(args, num_scenes=(2, MAX_SCENES), **sizes, max_shift=(0, IMAGE_SIZE - 1), seed=(0, 2**32 - 1))
        torch.manual_seed(args.seed)
        model = PoseRegressor(*make_tiny_vision(IMAGE_SIZE, BENCHMARK.preset["scale_factor"]))
        with naming_option("--output_dir"):
            make_own_folder(args.output_dir, OUTPUTS)
            make_own_folder(scenes, ["*.npz", ".*.npz.*"])  # the last are unfinished files
        if args.vision_weights:
            with naming_option("--vision_weights"):
                load_vision(model, args.vision_weights)
        with naming_option("--dataset_root"):
            frames = LeRobotChunkDataset(args.dataset_root, 1)
            poses = frames.vectors("observation.environment_state")
        with naming_option("--output_dir"):
            keep_options(args, free=["max_steps", "num_processes"])
    except ValueError as error:
        parser.error(str(error))
    try:
        pretrain(model, args, scenes, frames, poses)
    except KeyboardInterrupt:
        kept = interruption(args.output_dir, "the same command continues from there.").rstrip()
        parser.exit(130, f"{kept} Scenes that were drawn are kept in {scenes}.\n")


def pretrain(
    model: PoseRegressor, args: argparse.Namespace, scenes: Path, frames: LeRobotChunkDataset, poses: np.ndarray
) -> None:
    spawn = multiprocessing.get_context("spawn")
    with PartialState().main_process_first(), process_pool(args.num_processes, spawn) as pool:
        work = pool.map(partial(render_scenes, num_scenes=args.num_scenes, run=args.seed, folder=scenes), args.tasks)
        list(tqdm(work, total=len(args.tasks), unit="task"))
    parts = [np.load(scenes / f"{task}.npz") for task in args.tasks]
    images = np.concatenate([part["images"] for part in parts])
    labels = np.concatenate([part["poses"] for part in parts])[:, LABELS]
    places = np.concatenate([np.arange(len(part["images"])) / len(part["images"]) for part in parts])
    held_out = places < max(0.05, 2 / args.num_scenes)
    frame_labels = poses[:, LABELS]
    indices = np.flatnonzero(frames.frame_index % args.sample_every == 0)
    model.means.copy_(torch.from_numpy(labels.mean(axis=0)))
    groups = [{"params": list(model.parameters()), "lr": args.learning_rate, "weight_decay": 0.01}]
    trainer = AtomicCheckpointTrainer(
        model,
        TrainingArguments(
            args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            warmup_steps=min(200, args.max_steps // 10),
            lr_scheduler_type="cosine",
            bf16=bf16_is_faster(),
            use_cpu=not torch.cuda.is_available(),
            logging_steps=100,
            eval_strategy="steps",
            eval_steps=max(args.max_steps // 6, 1),
            save_steps=250,
            save_total_limit=1,
            report_to="none",
            seed=args.seed,
            dataloader_pin_memory=False,
        ),
        train_dataset=Pictures(images[~held_out], labels[~held_out], frames, frame_labels, indices, args.max_shift),
        eval_dataset=Pictures(images[held_out], labels[held_out]),
        compute_metrics=mean_error,
        optimizers=(make_muon(model, groups), None),
        callbacks=[EpochSetter(), SaveVision()],
    )
    trainer.train(resume_from_checkpoint="last")
    save_vision(model, args.output_dir)


if __name__ == "__main__":
    main()
