"""A training step of the real size against stock Transformers, on random weights of SmolVLM2-256M's shapes.

    python benchmarks/bench_training_256m.py          # part of `make bench`
    python benchmarks/bench_training_256m.py --more   # LoRA and compiled layers at scale 4

Stock is what a user would write without this repository: `SmolVLMForConditionalGeneration`'s own forward pass and loss
over the whole sequence, in fp32. Each way to train has a process of its own, so that its peak memory is its own; in
each round all of them take their turn. Some seven minutes on two cores for one round, and up to 17 GB. Writes
`benchmarks/results/bench_training_256m.json` and `.md`, or `bench_training_256m_more`.
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
from bench_256m import PREFILL_GFLOP, make_batch, make_model, make_stock, matmul_tflops
from peft import LoraConfig, get_peft_model

from smolandfast.compiling_smolandfast import compile_layers
from smolandfast.training_smolandfast import keep_freed_memory, make_optimizer

BATCH = {1: 4, 4: 8}  # by scale factor


@dataclass(frozen=True)
class Way:
    """One way to train: each field is something a user turns on. All but stock keep the memory they free."""

    is_stock: bool = False
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    is_compiled: bool = False
    is_checkpointed: bool = False
    has_lora: bool = False


BF16 = {"dtype": torch.bfloat16, "attention": "bf16_training"}
WAYS = {
    "stock fp32": Way(is_stock=True),
    "fp32": Way(),
    "fp32, compiled layers": Way(is_compiled=True),
    "bf16": Way(**BF16),
    "bf16, compiled layers": Way(**BF16, is_compiled=True),
    "bf16, gradient checkpointing": Way(**BF16, is_checkpointed=True),
    "bf16, LoRA": Way(**BF16, has_lora=True),
}
NAMES = {  # by scale factor
    1: ["stock fp32", "fp32, compiled layers", "bf16, compiled layers", "bf16, gradient checkpointing"],
    4: ["stock fp32", "fp32", "bf16"],
}
MORE_NAMES = {4: ["stock fp32", "fp32, compiled layers", "bf16, compiled layers", "bf16, LoRA"]}


def measure(way: Way, scale_factor: int) -> dict[str, float]:
    """Seconds of a step, peak memory in GB, the loss of the first step."""
    model = make_model(scale_factor).to(way.dtype)
    model = (make_stock(model) if way.is_stock else model).train()
    model.set_attn_implementation(way.attention)
    if not way.is_stock:
        keep_freed_memory()
    if way.is_checkpointed:
        model.gradient_checkpointing_enable()
    if way.is_compiled:
        compile_layers(model)
    if way.has_lora:
        lora = LoraConfig(r=16, target_modules="all-linear", exclude_modules="lm_head")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    optimizer, batch = make_optimizer(model), make_batch(scale_factor, BATCH[scale_factor], True)

    def step():
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    # The optimizer makes its state before the first step, and the first step is not timed: memory that is touched for
    # the first time costs up to a second a GB on a virtual machine. What compiles takes other memory in its first.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    losses = [step() for _ in range(1 + way.is_compiled)]
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    # Not `ru_maxrss`, which starts at what the parent process held.
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return {"seconds": seconds, "peak GB": int(peak) * 1024 / 1e9, "loss": losses[0]}


def measure_apart(function, *args):
    context = get_context("forkserver")  # its processes start with these imports, and without threads
    context.set_forkserver_preload(["peft", "scipy.fft", "torchao.quantization", "smolandfast.training_smolandfast"])
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(function, *args).result()


def bench(names: list[str], scale_factor: int, rounds: int, rates: dict[str, float]) -> dict[str, float]:
    found = {name: [] for name in names}
    for _ in range(rounds):
        for name, results in found.items():
            results.append(measure_apart(measure, WAYS[name], scale_factor))
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
    parser.add_argument("--more", action="store_true", help="the ways that `make bench` leaves out")
    args = parser.parse_args()
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rates = {name: measure_apart(matmul_tflops, dtype) for name, dtype in dtypes.items()}
    figures = {f"matrix products, {name}, TFLOP/s": rate for name, rate in rates.items()}
    for scale_factor, names in (MORE_NAMES if args.more else NAMES).items():
        figures |= bench(names, scale_factor, args.rounds, rates)
    path = RESULTS / ("bench_training_256m_more" if args.more else "bench_training_256m")
    write_table(path, describe_machine() | {"rounds": args.rounds}, figures)


if __name__ == "__main__":
    main()
