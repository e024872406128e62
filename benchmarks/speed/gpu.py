"""Time training and inference on a GPU, with random weights: called by `gpu.sh`.

Training is SmolVLM2-256M's, in bf16 autocast at scale factors 1 and 4, with batches that double until memory or time
runs out. A chunk is timed alone, from the model's inputs on the device to its ids. Nothing is downloaded.
`--device cpu --small` tries the script without a GPU.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from bench import CHECKPOINT, RESULTS, describe_machine, write_table
from bench_256m import TEXT, VISION, make_batch, make_model

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.training import make_optimizer

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


class Timer:
    """Seconds of a function on a device, the median of its calls after some that warm up."""

    def __init__(self, device: str, repeats: int, minutes: float):
        self.device, self.repeats, self.end = device, repeats, time.monotonic() + 60 * minutes

    def has_time(self) -> bool:
        return time.monotonic() < self.end

    def seconds(self, function, warm_up: int = 2) -> float:
        times = []
        for _ in range(warm_up + self.repeats):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[warm_up:])

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def bench_training(timer: Timer, scale_factor: int, max_batch: int) -> dict[str, float]:
    figures, device = {}, timer.device
    model = make_model(scale_factor).to(device).train()
    optimizer, batch_size = make_optimizer(model), 1

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    while batch_size <= max_batch and timer.has_time():
        batch = make_batch(scale_factor, batch_size, True, VISION["image_size"])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        title = f"256M training, bf16, scale {scale_factor}, batch {batch_size}"
        try:
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            figures[f"{title}: samples a second"] = batch_size / timer.seconds(step)
        except torch.OutOfMemoryError:
            print(f"{title}: out of memory", flush=True)
            break
        if device != "cpu":
            figures[f"{title}: peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        print(title, list(figures.values())[-2:], flush=True)
        batch_size *= 2
    return figures


def bench_chunks(timer: Timer) -> dict[str, float]:
    device, rng, cases = timer.device, np.random.default_rng(0), {}
    processor = SmolAndFastProcessor.from_pretrained(CHECKPOINT)
    tiny = SmolAndFastForActionPrediction.from_pretrained(CHECKPOINT, dtype=torch.float32)
    image = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
    cases["tiny, fp32"] = tiny, processor(images=[image], text=[""], state=rng.uniform(100, 400, (1, 2)))
    for scale_factor in (1, 4):
        inputs, model = make_batch(scale_factor, 1, False, VISION["image_size"]), make_model(scale_factor)
        cases[f"256M, bf16, scale {scale_factor}"] = model.to(torch.bfloat16), inputs
    figures = {}
    for name, (model, inputs) in cases.items():
        inputs = {key: tensor.to(device) for key, tensor in inputs.items()}
        model = model.to(device).eval()
        ids = model.generate(**inputs)
        tokens = ids.shape[1] - inputs["input_ids"].shape[1]
        generate = lambda model=model, inputs=inputs: model.generate(**inputs)  # noqa: E731
        figures[f"one chunk, {name}, {tokens} tokens: ms"] = 1e3 * timer.seconds(generate)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="layers and images that a CPU runs in seconds")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=4.0, help="no larger batch is begun after these")
    parser.add_argument("--max_batch", type=int, default=512)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu", help="without .json and .md")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device is {args.device}, but PyTorch sees no GPU. Try --device cpu --small.")
    if args.small:
        VISION.update(SMALL, image_size=64)
        TEXT.update(SMALL, num_key_value_heads=1)
    timer, machine = Timer(args.device, args.repeats, args.minutes), describe_machine() | {"repeats": args.repeats}
    if args.device != "cpu":
        machine["gpu"] = torch.cuda.get_device_name()
    figures = bench_chunks(timer)
    for scale_factor in (4, 1):
        figures |= bench_training(timer, scale_factor, args.max_batch)
    write_table(args.output, machine, figures)


if __name__ == "__main__":
    main()
