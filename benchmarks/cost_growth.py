"""How the cost of an action chunk grows at the real size: with visual tokens, chunk length and batch.

    python benchmarks/cost_growth.py

Random weights of SmolVLM2-256M's shapes, packed bf16, one coefficient a token. Latency is the median of the repeats,
memory the process's peak while it writes the chunks. Some minutes on two cores and 4 GB; Linux alone. Writes
`benchmarks/results/cost_growth.json` and `assets/cost_growth.png`.
"""

import argparse
import ctypes
import json
from pathlib import Path

import matplotlib
import torch
from bench import RESULTS, ROOT, describe_machine, seconds
from bench_256m import ACTION_DIM, make_batch, make_model, our_chunk

IMAGE_SIZES = (128, 256, 384, 512)
SCALE_FACTORS = (1, 2, 4)
CHUNK_SIZES = (4, 8, 16, 32)
BATCH_SIZES = (1, 2, 4, 8, 16)


def measure(model, batch: dict[str, torch.Tensor], repeats: int) -> dict[str, float]:
    """Seconds of a call, and the process's peak memory in GB while it runs."""
    (latency,) = seconds(lambda: our_chunk(model, batch), repeats=repeats)
    ctypes.CDLL(None).malloc_trim(0)  # what is freed goes back, of earlier cases and of making the model
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    our_chunk(model, batch)
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return {"seconds": latency, "peak_gb": int(peak) * 1024 / 1e9}


def make_packed(scale_factor: int, **kwargs):
    return make_model(scale_factor, **kwargs).to(torch.bfloat16).eval().pack()


def measure_all(repeats: int) -> dict[str, list[dict]]:
    found = {"visual tokens": [], "chunk length": [], "batch": []}
    for scale_factor in SCALE_FACTORS:
        model = None  # the one before makes room
        model = make_packed(scale_factor)
        for image_size in IMAGE_SIZES:
            case = {"scale_factor": scale_factor, "image_size": image_size}
            case["visual_tokens"] = (image_size // 16 // scale_factor) ** 2
            batch = make_batch(scale_factor, 1, False, image_size)
            found["visual tokens"].append(case | measure(model, batch, repeats))
            print(found["visual tokens"][-1], flush=True)
    for batch_size in BATCH_SIZES:
        case = {"scale_factor": 4, "batch": batch_size}
        found["batch"].append(case | measure(model, make_batch(4, batch_size, False), repeats))
        print(found["batch"][-1], flush=True)
    for chunk_size in CHUNK_SIZES:
        case = {"scale_factor": 4, "tokens": chunk_size * ACTION_DIM}
        model = None
        model = make_packed(4, chunk_size=chunk_size)
        found["chunk length"].append(case | measure(model, make_batch(4, 1, False), repeats))
        print(found["chunk length"][-1], flush=True)
    return found


def plot(found: dict[str, list[dict]], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"visual_tokens": "visual tokens", "tokens": "action tokens of a chunk", "batch": "robots at once"}
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), sharex="col", layout="constrained")
    for column, (cases, name) in enumerate(zip(found.values(), ("visual_tokens", "tokens", "batch"), strict=True)):
        for row, (value, label) in enumerate({"seconds": "latency, s", "peak_gb": "peak memory, GB"}.items()):
            panel = axes[row, column]
            for scale_factor in SCALE_FACTORS:
                points = [case for case in cases if case["scale_factor"] == scale_factor]
                if points:
                    x, y = ([case[key] for case in points] for key in (name, value))
                    panel.plot(x, y, marker="o", label=f"scale_factor {scale_factor}")
            panel.set_ylim(0, 1.1 * max(case[value] for case in cases))
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(label)
        panel.set_xlabel(labels[name])
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
    axes[0, 0].set_title(f"image {IMAGE_SIZES[0]} to {IMAGE_SIZES[-1]} pixels, one robot")
    axes[0, 1].set_title("512 pixels, one robot")
    axes[0, 2].set_title("512 pixels, one chunk each")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    found = measure_all(args.repeats)
    content = {"machine": describe_machine() | {"repeats": args.repeats}, "cases": found}
    (RESULTS / "cost_growth.json").write_text(json.dumps(content, indent=2) + "\n")
    plot(found, ROOT / "assets/cost_growth.png")


if __name__ == "__main__":
    main()
