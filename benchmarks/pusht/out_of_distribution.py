"""The confidence scores of `processor.report` on held-out demonstrations and on out-of-distribution images.

    python benchmarks/pusht/out_of_distribution.py --dataset_root path/to/pusht

Writes `benchmarks/results/out_of_distribution.json`. `pairs_ranked_right` is the share of pairs of a demonstration and
an out-of-distribution image in which the demonstration scores higher; 0.5 is chance.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from evaluate import load_policy, write_json  # noqa: E402

from smolandfast.training import LeRobotChunkDataset  # noqa: E402

FRAMES = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_root", required=True)
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints/pusht-tiny"))
    args = parser.parse_args()
    model, processor = load_policy(args.checkpoint, dtype=torch.float32)
    episodes = LeRobotChunkDataset(args.dataset_root, 1, [0]).info["total_episodes"]
    dataset = LeRobotChunkDataset(args.dataset_root, processor.chunk_size, range(episodes - 6, episodes))
    samples = [dataset[int(i)] for i in np.linspace(0, len(dataset) - 1, FRAMES)]
    states, images = np.stack([s["state"] for s in samples]), np.stack([s["images"][0] for s in samples])
    kinds = {
        "held-out demonstrations": images,
        "images of other moments": np.roll(images, FRAMES // 2, axis=0),
        "upside down": images[:, ::-1, ::-1],
        "noise": np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8),
        "black": np.zeros_like(images),
        "white": np.full_like(images, 255),
    }
    results, demonstration_scores = {}, None
    for kind, shown in kinds.items():
        inputs = processor(images=list(shown), text=[""] * FRAMES, state=states)
        output = model.generate(**inputs, return_dict_in_generate=True, output_scores=True)
        report = processor.report(output, states)
        scores = report["log_probability"]
        demonstration_scores = scores if demonstration_scores is None else demonstration_scores
        results[kind] = {
            "log_probability": round(float(scores.mean()), 3),
            "percentile_5": round(float(np.quantile(scores, 0.05)), 3),
            "pairs_ranked_right": round(float((demonstration_scores[:, None] > scores).mean()), 3),
            "clipped_actions": round(float(report["clipped_actions"].mean()), 3),
        }
        print(kind, results[kind])
    write_json(ROOT / "benchmarks/results/out_of_distribution.json", {"frames": FRAMES, **results})


if __name__ == "__main__":
    main()
