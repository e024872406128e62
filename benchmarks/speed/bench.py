"""Time inference and training of the shipped policy: `make bench`.

Both sides of a comparison alternate in one process; each figure is a median. Nothing else should run on the machine.
Writes `benchmarks/results/bench.json` and `bench.md`.
"""

import json
import platform
import statistics
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.training import bf16_is_faster, make_optimizer

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "checkpoints/pusht-tiny"
RESULTS = ROOT / "benchmarks/results"


def seconds(*functions, repeats: int = 7) -> list[float]:
    """Median seconds of each function, called in turn; the first round is a warm-up."""
    rounds = []
    for _ in range(repeats + 1):
        rounds.append([])
        for function in functions:
            start = time.perf_counter()
            function()
            rounds[-1].append(time.perf_counter() - start)
    return [statistics.median(times) for times in zip(*rounds[1:], strict=True)]


def bench_policy() -> dict[str, float]:
    processor = SmolAndFastProcessor.from_pretrained(CHECKPOINT)
    model = SmolAndFastForActionPrediction.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (64, 96, 96, 3), dtype=np.uint8))
    states = rng.uniform(100, 400, (64, 2))
    actions = states[:, None] + rng.normal(0, 20, (64, processor.chunk_size, 2))

    def chunks(count: int):
        inputs = processor(images=images[:count], text=[""] * count, state=states[:count])
        processor.post_process_actions(model.generate(**inputs))

    one, sixteen = seconds(lambda: chunks(1), lambda: chunks(16))
    figures = {"one chunk, ms": one * 1e3, "16 chunks at once, ms a chunk": sixteen / 16 * 1e3}
    batch = processor(images=images, text=[""] * 64, state=states, actions=actions)
    optimizer = make_optimizer(model.train())

    def step(attention: str, bf16: bool):
        model.set_attn_implementation(attention)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    cases = [(attention, bf16) for attention in ("eager", "sdpa") for bf16 in (False, True)]
    times = seconds(*[partial(step, *case) for case in cases], repeats=3)
    for (attention, bf16), step_seconds in zip(cases, times, strict=True):
        figures[f"training, samples a second, {attention} {'bf16' if bf16 else 'fp32'}"] = 64 / step_seconds
    return figures


def describe_machine() -> dict:
    packages = ("torch", "transformers", "tokenizers", "scipy", "numpy")
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "bf16 is faster": bf16_is_faster(),
        "python": sys.version.split()[0],
        **{name: version(name) for name in packages},
    }


def write_table(path: Path, machine: dict, figures: dict[str, float]) -> None:
    """Write `path`.json and a Markdown table, `path`.md."""
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")
    texts = {name: f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for name, value in figures.items()}
    rows = [f"| {name} | {text} |" for name, text in texts.items()]
    notes = ", ".join(f"{name} {value}" for name, value in machine.items())
    table = "\n".join(["| what | median |", "|---|---|", *rows, "", notes, ""])
    path.with_suffix(".md").write_text(table)
    print(table)


def main() -> None:
    write_table(RESULTS / "bench", describe_machine(), bench_policy())


if __name__ == "__main__":
    main()
