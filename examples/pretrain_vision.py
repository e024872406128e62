"""Pretrain the tiny vision tower: find what matters in a benchmark's images, such as the T and the pusher.

    python examples/pretrain_vision.py --output_dir outputs/vision
    python examples/pretrain_vision.py --output_dir outputs/vision2 --near_target 0.6 --num_scenes 60000 \\
        --learning_rate 7e-4 --seed 10 --vision_weights outputs/vision/vision.safetensors
    python examples/pretrain_vision.py --benchmark metaworld --dataset_root outputs/metaworld --output_dir outputs/mw

SmolVLM's vision tower is pretrained; the tiny one is not, and it learns little from the policy's loss alone. Labels
come from the simulator: `Pretraining` in `envs/<benchmark>/pretraining.py` renders scenes, or reads demonstrations.
The output, written in the end, is `vision.safetensors`: the weights of the vision tower and the connector, for
`train.py --vision_weights`. The second command continues from there, with more scenes in which the T is near its
target, where one pixel matters. To continue an interrupted run, give the same command again; only `--max_steps` may
differ.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import interrupt  # noqa: F401 - before the slow imports
import torch
from envs import BENCHMARKS, Benchmark
from evaluate import parse_with_part
from safetensors.torch import save_file
from torch import nn
from training_runs import (
    OPTIONS,
    EpochSetter,
    check_learning_rate,
    check_numbers,
    interruption,
    keep_options,
    make_own_folder,
    naming_option,
    read_weights,
)
from transformers import TrainingArguments

from smolandfast.files_smolandfast import atomic_write
from smolandfast.training import AtomicCheckpointTrainer, bf16_is_faster, make_muon, make_tiny_vision

# The files that pretraining writes; those with a dot are unfinished. A policy's checkpoints have others.
CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "scaler.pt")
CHECKPOINT_FILES += ("trainer_state.json", "training_args.bin", "SHA256SUMS", ".SHA256SUMS.*")
OUTPUTS = [OPTIONS, f".{OPTIONS}.*", "vision.safetensors", ".vision.safetensors.*"]
OUTPUTS += [f"checkpoint-*/{name}" for name in CHECKPOINT_FILES]


class PoseRegressor(nn.Module):
    """The vision tower and connector of the tiny model, with a linear layer that predicts a benchmark's labels."""

    def __init__(self, benchmark: Benchmark, pretraining: Any):
        super().__init__()
        tower = make_tiny_vision(benchmark.image_size, benchmark.preset["scale_factor"])
        self.vision_model, self.connector, num_features = tower
        self.head = nn.Linear(num_features, pretraining.num_labels)
        self.loss = pretraining.loss

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 `(B, image_size, image_size, 3)` and labels `(B, num_labels)` -> loss and predictions."""
        pixels = pixel_values.permute(0, 3, 1, 2).float() / 127.5 - 1  # as in the processor
        tokens = self.connector(self.vision_model(pixels).last_hidden_state)
        predictions = self.head(tokens.flatten(1)).float()
        return {"loss": self.loss(predictions, labels), "predictions": predictions}


def load_vision(model: nn.Module, path: str) -> None:
    """Load the output of [`save_vision`], or these parts of a policy's `model.safetensors`; the head stays."""
    weights = {name.removeprefix("model."): tensor for name, tensor in read_weights(path).items()}
    weights = {name: weight for name, weight in weights.items() if not name.startswith(("text_model.", "lm_head."))}
    try:
        model.load_state_dict(weights | {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()})
    except RuntimeError as error:
        raise ValueError(f"{path} is not a vision.safetensors of this script: {error}") from error


def save_vision(model: nn.Module, folder: str) -> None:
    """Write the vision tower and the connector to `vision.safetensors`."""
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    with atomic_write(Path(folder) / "vision.safetensors") as path:
        save_file(tensors, path)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="pusht", help="simulator of the images (pusht)")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--vision_weights", help="vision.safetensors of an earlier run, or a policy, to continue from")
    parser.add_argument("--seed", type=int, default=0, help="changes the scenes too (0)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args, benchmark, pretraining_class = parse_with_part(parser, argv, BENCHMARKS, "Pretraining")
    try:
        check_learning_rate(args)
        check_numbers(args, max_steps=(1, math.inf), batch_size=(1, math.inf), **pretraining_class.limits)
        torch.manual_seed(args.seed)
        with naming_option("--output_dir"):
            make_own_folder(args.output_dir, OUTPUTS)
        pretraining = pretraining_class(args)
        model = PoseRegressor(benchmark, pretraining)
        if args.vision_weights:
            with naming_option("--vision_weights"):
                load_vision(model, args.vision_weights)
        with naming_option("--output_dir"):
            keep_options(args, free=["max_steps", "num_processes"])
    except ValueError as error:
        parser.error(str(error))
    try:
        pretrain(model, pretraining, args)
    except OSError as error:  # the disk is full
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, interruption(args.output_dir, "the same command", pretraining.kept))


def pretrain(model: PoseRegressor, pretraining: Any, args: argparse.Namespace) -> None:
    train_set, eval_set = pretraining.make_sets()
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
            eval_steps=max(args.max_steps // 10, 1),
            save_steps=250,
            save_total_limit=1,
            report_to="none",
            seed=args.seed,
            dataloader_pin_memory=False,
        ),
        train_dataset=train_set,
        eval_dataset=eval_set,
        compute_metrics=pretraining.metrics,
        optimizers=(make_muon(model, groups), None),
        callbacks=[EpochSetter()],
    )
    trainer.train(resume_from_checkpoint="last")
    save_vision(model, args.output_dir)  # last: runs/*.sh take it for the sign that this has finished


if __name__ == "__main__":
    main()
