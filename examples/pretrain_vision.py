"""Pretrain the tiny vision tower: find the agent, the T and the target in scenes rendered at random poses.

    python examples/pretrain_vision.py --output_dir outputs/vision
    python examples/pretrain_vision.py --output_dir outputs/vision2 --near_target 0.6 --num_scenes 60000 \\
        --learning_rate 7e-4 --seed 10 --vision_weights outputs/vision/vision.safetensors

SmolVLM's vision tower comes pretrained; the tiny one does not, and from the policy's loss alone it hardly learns to
see. Scenes and labels come from the simulator; no demonstrations or actions are used. Writes `vision.safetensors`, the
weights of the vision tower and the connector, for `train.py --vision_weights`. The second command continues from
there, with more scenes in which the T lies near its target, where one pixel matters. A run that was interrupted
continues when the same command is given again; all but `--max_steps` has to be as before.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import interrupt  # noqa: F401 - before all that takes long
import numpy as np
import torch
from pusht import WORLD_SIZE
from pusht_scenes import NUM_POINTS, EpochSetter, render_scenes, vary_scene
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from training_runs import (
    OPTIONS,
    EpochDataset,
    check_numbers,
    interruption,
    keep_options,
    make_own_folder,
    naming_option,
    process_pool,
)
from transformers import TrainerCallback, TrainingArguments

from smolandfast.files_smolandfast import atomic_write
from smolandfast.training import AtomicCheckpointTrainer, bf16_is_faster, make_muon, make_tiny_vision

HARMONICS = 4  # of the T's angle, in the labels
# What pretraining writes: not the files that only a policy's checkpoints have. Those with a dot are unfinished.
CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "scaler.pt")
CHECKPOINT_FILES += ("trainer_state.json", "training_args.bin", "SHA256SUMS", ".SHA256SUMS.*")
OUTPUTS = [OPTIONS, f".{OPTIONS}.*", "vision.safetensors", ".vision.safetensors.*"]
OUTPUTS += [f"checkpoint-*/{name}" for name in CHECKPOINT_FILES]


def make_labels(points: np.ndarray) -> np.ndarray:
    """What the model learns to predict from an image: `(5, 2)` points -> 18 numbers.

    The points, in [-1, 1]; then cosine and sine of one to four times the T's angle. From the points alone, the
    direction is learnt late: to know the axis but not its sign, or the angle up to a third of a turn, does not lower
    their error. It does lower that of the second or third harmonic.
    """
    x, y = points[2] - points[1]
    angles = np.arctan2(y, x) * np.arange(1, HARMONICS + 1)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([points.ravel() / (WORLD_SIZE / 2) - 1, directions.ravel()]).astype(np.float32)


class PoseRegressor(nn.Module):
    """The vision tower and connector of the tiny model, with a linear layer that predicts the labels."""

    def __init__(self, vision_model: nn.Module, connector: nn.Module, num_features: int):
        super().__init__()
        self.vision_model = vision_model
        self.connector = connector
        self.head = nn.Linear(num_features, NUM_POINTS * 2 + HARMONICS * 2)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """`(B, 3, 96, 96)` and labels `(B, 18)` -> loss and positions `(B, 10)`."""
        tokens = self.connector(self.vision_model(pixel_values).last_hidden_state)
        poses = self.head(tokens.flatten(1)).float()
        errors = (poses - labels) ** 2
        loss = 10 * errors[:, : NUM_POINTS * 2].mean() + errors[:, NUM_POINTS * 2 :].mean()
        return {"loss": loss, "positions": poses[:, : NUM_POINTS * 2]}


class Scenes(EpochDataset):
    """Scenes and their labels, varied in another way in every epoch of the training."""

    def __init__(self, images: np.ndarray, points: np.ndarray, seed: int):
        super().__init__()
        self.images, self.points, self.seed = images, points, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, self.epoch, i))
        options = {"turn_probability": 0.5, "max_shift": 6, "max_angle": 15}
        image, points = vary_scene(self.images[i], self.points[i], rng, **options)
        pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1  # as the processor normalises
        return {"pixel_values": pixels, "labels": torch.from_numpy(make_labels(points))}


class SaveVision(TrainerCallback):
    """Writes `vision.safetensors` with each checkpoint."""

    def on_save(self, args, state, control, model, **kwargs):
        save_vision(model, args.output_dir)


def load_vision(model: nn.Module, path: str) -> None:
    """Load what [`save_vision`] wrote, or these parts of a policy's `model.safetensors`; the linear layer stays.

    Raises:
        ValueError: a missing or damaged file, or one with other weights.
    """
    try:
        tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
        tensors = {
            name: tensor for name, tensor in tensors.items() if not name.startswith(("text_model.", "lm_head."))
        }
        model.load_state_dict(tensors | {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is no vision.safetensors of this script: {error}") from error


def save_vision(model: nn.Module, folder: str) -> None:
    """Write the vision tower and the connector to `vision.safetensors`: all of the file or none of it."""
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    with atomic_write(Path(folder) / "vision.safetensors") as path:
        save_file(tensors, path)


def mean_error_pixels(prediction) -> dict[str, float]:
    """Mean distance between each point's prediction and its label, in the simulator's pixels (512 along each side)."""
    errors = prediction.predictions - prediction.label_ids[:, : NUM_POINTS * 2]
    distances = np.linalg.norm(errors.reshape(-1, NUM_POINTS, 2) * (WORLD_SIZE / 2), axis=2).mean(axis=0)
    agent, bar, stem, *target = distances
    return {"agent_px": agent, "bar_px": bar, "stem_px": stem, "target_px": np.mean(target)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/vision")
    parser.add_argument("--num_scenes", type=int, default=40_000)
    parser.add_argument("--max_steps", type=int, default=6_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--near_target", type=float, default=0.3, help="share of scenes with the T near its target")
    parser.add_argument("--vision_weights", help="vision.safetensors of an earlier run to continue from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    try:
        sizes = dict.fromkeys(("max_steps", "batch_size"), (1, math.inf))
        check_numbers(args, num_scenes=(2, math.inf), **sizes, near_target=(0, 1), seed=(0, 2**32 - 2))
        torch.manual_seed(args.seed)
        model = PoseRegressor(*make_tiny_vision())
        with naming_option("--output_dir"):
            make_own_folder(args.output_dir, OUTPUTS)
        if args.vision_weights:
            with naming_option("--vision_weights"):
                load_vision(model, args.vision_weights)
        with naming_option("--output_dir"):
            keep_options(args, free=["max_steps"])
    except ValueError as error:
        parser.error(str(error))
    try:
        pretrain(model, args)
    except KeyboardInterrupt:
        parser.exit(130, interruption(args.output_dir, "the same command continues from there."))


def pretrain(model: nn.Module, args: argparse.Namespace) -> None:
    with process_pool(2) as pool:
        render = partial(render_scenes, args.num_scenes // 2, near_target=args.near_target)
        parts = list(pool.map(render, [args.seed, args.seed + 1]))
    images, points = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    held_out = max(args.num_scenes // 60, 1)
    groups = [{"params": list(model.parameters()), "lr": args.learning_rate, "weight_decay": 0.01}]
    trainer = AtomicCheckpointTrainer(
        model,
        TrainingArguments(
            args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            warmup_steps=200,
            lr_scheduler_type="cosine",
            bf16=bf16_is_faster(),
            use_cpu=not torch.cuda.is_available(),
            logging_steps=100,
            eval_strategy="steps",
            eval_steps=500,
            save_steps=500,
            save_total_limit=1,
            report_to="none",
            seed=args.seed,
            dataloader_pin_memory=False,
        ),
        train_dataset=Scenes(images[held_out:], points[held_out:], args.seed),
        eval_dataset=Scenes(images[:held_out], points[:held_out], args.seed),
        compute_metrics=mean_error_pixels,
        optimizers=(make_muon(model, groups), None),
        callbacks=[EpochSetter(), SaveVision()],
    )
    trainer.train(resume_from_checkpoint="last")
    save_vision(model, args.output_dir)  # a run killed during its last save may not have written it


if __name__ == "__main__":
    main()
