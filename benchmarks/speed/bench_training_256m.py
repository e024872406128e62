"""Time a training step with SmolVLM2-256M's shapes and random weights against stock Transformers.

    python benchmarks/speed/bench_training_256m.py     # part of `make bench`

Stock is what a user would write without this repository: the forward pass and loss of
`SmolVLMForConditionalGeneration` over the whole sequence. Each way to train runs in its own process, which measures
peak memory; they take turns in each round. A round takes ten minutes on two cores, and up to 17 GB. Writes
`benchmarks/results/bench_training_256m.json` and `.md`.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from bench import RESULTS, describe_machine, write_table
from bench_256m import make_batch, make_model, make_stock
from peft import LoraConfig, get_peft_model

from smolandfast.training import make_optimizer

BATCH = {1: 2, 4: 4}  # by scale factor


@dataclass(frozen=True)
class Way:
    """One way to train."""

    is_stock: bool = False
    is_autocast: bool = True  # TrainingArguments(bf16=True)
    is_checkpointed: bool = False
    has_lora: bool = False  # the frozen weights in bf16, the adapters in fp32


WAYS = {
    "stock, fp32": Way(is_stock=True, is_autocast=False),
    "stock, bf16 autocast": Way(is_stock=True),
    "bf16 autocast": Way(),
    "bf16 autocast, gradient checkpointing": Way(is_checkpointed=True),
    "LoRA, bf16 autocast": Way(has_lora=True),
}


def measure(way: Way, scale_factor: int) -> dict[str, float]:
    """Seconds of a step, peak memory in GB, and the loss of the first step."""
    model = make_model(scale_factor).to(torch.bfloat16 if way.has_lora else torch.float32)
    model = (make_stock(model) if way.is_stock else model).train()
    if way.is_checkpointed:
        model.gradient_checkpointing_enable()
    if way.has_lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", exclude_modules="lm_head"))
    optimizer, batch = make_optimizer(model), make_batch(scale_factor, BATCH[scale_factor], True)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=way.is_autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    loss = step()  # not timed: it allocates the optimizer's state
    times = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    # `ru_maxrss` would start at the parent's memory.
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return {"seconds": min(times), "peak GB": int(peak) * 1024 / 1e9, "loss": loss}


def measure_in_process(*args):
    context = get_context("forkserver")  # new processes have these imports, and no threads
    context.set_forkserver_preload(["peft", "scipy.fft", "smolandfast.training"])
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(measure, *args).result()


def bench(scale_factor: int, rounds: int) -> dict[str, float]:
    results = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            results[name].append(measure_in_process(way, scale_factor))
            print(scale_factor, name, results[name][-1], flush=True)
    medians = {
        name: {key: float(np.median([run[key] for run in runs])) for key in runs[0]} for name, runs in results.items()
    }
    stock, batch_size, figures = medians["stock, fp32"], BATCH[scale_factor], {}
    for name, median in medians.items():
        title = f"scale {scale_factor}, batch {batch_size}, {name}"
        figures[f"{title}: samples a second"] = batch_size / median["seconds"]
        figures[f"{title}: samples a second, times stock fp32"] = stock["seconds"] / median["seconds"]
        figures[f"{title}: peak GB"] = median["peak GB"]
        figures[f"{title}: difference in loss, relative"] = abs(median["loss"] / stock["loss"] - 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    figures = {}
    for scale_factor in BATCH:
        figures |= bench(scale_factor, args.rounds)
    write_table(RESULTS / "bench_training_256m", describe_machine() | {"rounds": args.rounds}, figures)


if __name__ == "__main__":
    main()
