"""A training step of the real size against stock Transformers, on random weights of SmolVLM2-256M's shapes.

    python benchmarks/bench_training_256m.py

Part of `make bench`. Stock is what a user would write without this repository: `SmolVLMForConditionalGeneration`'s own
forward pass and loss over the whole sequence, in fp32. Each way to train has a process of its own, so that its peak
memory is its own; in each round all of them take their turn. Some ten minutes on two cores for one round, and up to
16 GB. Writes `benchmarks/results/bench_training_256m.json` and `.md`.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bench import RESULTS, describe_machine, write_table
from bench_256m import PREFILL_GFLOP, make_batch, make_model, make_stock, matmul_tflops
from peft import LoraConfig, get_peft_model

from smolandfast.training_smolandfast import make_optimizer

BATCH = {1: 4, 4: 8}  # by scale factor


@dataclass(frozen=True)
class Way:
    """One way to train: each field is something a user turns on."""

    is_stock: bool = False
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    attention: str = "sdpa"
    is_compiled: bool = False
    is_checkpointed: bool = False
    has_lora: bool = False


BF16 = {"dtype": torch.bfloat16, "attention": "bf16_training"}
WAYS = {
    "stock fp32": Way(is_stock=True),
    "fp32": Way(),
    "bf16 autocast": Way(autocast=True, attention="bf16_training"),
    "bf16": Way(**BF16),
    "bf16, compiled layers": Way(**BF16, is_compiled=True),
    "bf16, gradient checkpointing": Way(**BF16, is_checkpointed=True),
    "bf16, LoRA": Way(**BF16, has_lora=True),
}
WAYS_BY_SCALE = {
    1: ["stock fp32", "fp32", "bf16", "bf16, gradient checkpointing"],
    4: [name for name in WAYS if name != "bf16, gradient checkpointing"],
}


def measure(way: Way, scale_factor: int) -> dict[str, float]:
    """Seconds of a step, peak memory in GB with the optimizer's state, the loss of one sample before any step."""
    model = make_model(scale_factor).to(way.dtype)
    model = (make_stock(model) if way.is_stock else model).train()
    model.set_attn_implementation(way.attention)
    if way.is_checkpointed:
        model.gradient_checkpointing_enable()
    if way.is_compiled:
        for layer in [*model.model.vision_model.encoder.layers, *model.model.text_model.layers]:
            layer.compile()
    if way.has_lora:
        lora = LoraConfig(r=16, target_modules="all-linear", exclude_modules="lm_head")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    optimizer = make_optimizer(model)

    def step(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=way.autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    batch = make_batch(scale_factor, BATCH[scale_factor], True)
    loss = step(make_batch(scale_factor, 1, True))  # makes the optimizer's state
    step(batch)  # compiles, and touches memory for the first time: on a virtual machine up to a second a GB
    start = time.perf_counter()
    step(batch)
    seconds = time.perf_counter() - start
    # Not `ru_maxrss`, which starts at what the parent process held.
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return {"seconds": seconds, "peak GB": int(peak) * 1024 / 1e9, "loss": loss}


def measure_apart(name: str, scale_factor: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--way", name, "--scale_factor", str(scale_factor)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def bench(scale_factor: int, rounds: int, rates: dict[str, float]) -> dict[str, float]:
    found = {name: [] for name in WAYS_BY_SCALE[scale_factor]}
    for _ in range(rounds):
        for name, results in found.items():
            results.append(measure_apart(name, scale_factor))
    medians = {
        name: {key: float(np.median([result[key] for result in results])) for key in results[0]}
        for name, results in found.items()
    }
    stock, batch_size, figures = medians["stock fp32"], BATCH[scale_factor], {}
    for name, median in medians.items():
        title = f"scale {scale_factor}, batch {batch_size}, {name}"
        tflops = 3 * batch_size * PREFILL_GFLOP[scale_factor] / 1e3 / median["seconds"]
        figures[f"{title}: samples a second"] = batch_size / median["seconds"]
        figures[f"{title}: samples a second, times stock"] = stock["seconds"] / median["seconds"]
        figures[f"{title}: peak GB"] = median["peak GB"]
        figures[f"{title}: peak memory, times stock"] = median["peak GB"] / stock["peak GB"]
        figures[f"{title}: difference in loss, relative"] = abs(median["loss"] / stock["loss"] - 1)
        if "LoRA" not in name:  # which has no gradients of the weights to compute
            figures[f"{title}: share of the matrix rate"] = tflops / rates["bf16" if "bf16" in name else "fp32"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--scale_factor", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(WAYS[args.way], args.scale_factor)))
        return
    rates = {"fp32": matmul_tflops(torch.float32), "bf16": matmul_tflops(torch.bfloat16)}
    figures = {f"matrix products, {name}, TFLOP/s": rate for name, rate in rates.items()}
    for scale_factor in BATCH:
        figures |= bench(scale_factor, args.rounds, rates)
    write_table(RESULTS / "bench_training_256m", describe_machine() | {"rounds": args.rounds}, figures)


if __name__ == "__main__":
    main()
