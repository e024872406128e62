"""Whether training in bf16 learns what fp32 learns: the loss of both, step by step, on the same samples.

    python benchmarks/bf16_loss_curve.py --dataset_root path/to/pusht

The tiny policy from random weights on PushT demonstrations: fp32, bf16 with `make_optimizer`'s fp32 master weights and
the `bf16_training` attention, and for comparison bf16 with PyTorch's AdamW, which rounds every update.
Some fifteen minutes on one core. Writes `benchmarks/results/bf16_loss_curve.json` and `.png`.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from bench import RESULTS, describe_machine

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from lerobot_dataset import LeRobotChunkDataset
from train_pusht import make_policy, parse_args

from smolandfast.training_smolandfast import ActionDataCollator, make_optimizer, parameter_groups

WARMUP_STEPS = 20
RATES = {"vision_learning_rate": 5e-4, "connector_learning_rate": 5e-4, "text_learning_rate": 5e-4}


def train(dataset, policy_args, kind: str, steps: int, batch_size: int) -> list[float]:
    torch.manual_seed(0)
    model, processor = make_policy(dataset, policy_args)
    model.train()
    if kind != "fp32":
        model.to(torch.bfloat16).set_attn_implementation("bf16_training")
    optimizer = make_optimizer(model, **RATES)
    if kind == "bf16 weights alone":
        optimizer = torch.optim.AdamW(parameter_groups(model, **RATES), betas=(0.9, 0.95), fused=True)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    collate, rng, losses = ActionDataCollator(processor), np.random.default_rng(0), []
    for _ in range(steps):
        samples = [dataset[int(i)] for i in rng.integers(0, len(dataset), batch_size)]
        loss = model(**collate(samples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_root", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    policy_args, _ = parse_args(["--preset", "tiny", "--dataset_root", args.dataset_root, "--output_dir", "unused"])
    dataset = LeRobotChunkDataset(args.dataset_root, policy_args.chunk_size, range(20))
    curves = {}
    for kind in ("fp32", "bf16 with fp32 master weights", "bf16 weights alone"):
        curves[kind] = train(dataset, policy_args, kind, args.steps, args.batch_size)
        print(kind, "last 50 steps:", np.mean(curves[kind][-50:]), flush=True)
    figure, axes = plt.subplots(figsize=(7, 4))
    for kind, losses in curves.items():
        window = min(20, len(losses))
        axes.plot(
            np.arange(window, len(losses) + 1), np.convolve(losses, np.ones(window) / window, "valid"), label=kind
        )
    axes.set(xlabel="step", ylabel="loss, mean of 20 steps")
    axes.legend()
    figure.savefig(RESULTS / "bf16_loss_curve.png", dpi=120, bbox_inches="tight")
    result = {"machine": describe_machine(), "batch_size": args.batch_size, "losses": curves}
    (RESULTS / "bf16_loss_curve.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
