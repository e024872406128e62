"""Play the shipped policy for thousands of episodes in one process, to find memory leaks and drifting results.

    python benchmarks/speed/soak.py --episodes 2000

Memory is measured after each round of episodes. Then some seeds are played again, each in a new process: lengths must
be equal, and rewards except for the last digits, because gym-pusht adds areas in an order that depends on memory
addresses. Writes `benchmarks/results/soak.json`.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from envs.pusht import BENCHMARK as PUSHT  # noqa: E402
from evaluate import installed_versions, load_policy, make_predict, write_json  # noqa: E402
from rollouts import Predict, rollout  # noqa: E402


def memory_mb() -> float:
    """Resident memory of this process, in MB."""
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) / 1024


def play(predict: Predict, n_action_steps: int, seeds: range, num_envs: int) -> list[tuple[float, float, int]]:
    """Maximum reward, sum of rewards and length of each episode."""
    result = rollout(PUSHT, predict, seeds, n_action_steps, num_envs=num_envs)
    return list(zip(result.max_rewards, result.sum_rewards, result.lengths, strict=True))


def play_alone(checkpoint: Path, seed: int) -> tuple[float, float, int]:
    """The scores of one seed in a new process."""
    command = [sys.executable, __file__, "--checkpoint", str(checkpoint), "--alone", str(seed)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints/pusht-tiny")
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=200_000, help="episode i resets its environment with seed + i")
    parser.add_argument("--round", type=int, default=20, help="episodes between two measurements of memory")
    parser.add_argument("--num_envs", type=int, default=1, help="episodes side by side; rounding may depend on it")
    parser.add_argument("--again", type=int, default=10, help="seeds to play again, each alone")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/soak.json")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    model, processor = load_policy(args.checkpoint, dtype=torch.float32)
    predict, n_action_steps = make_predict(model, processor), model.config.n_action_steps
    if args.alone is not None:
        print(json.dumps(play(predict, n_action_steps, range(args.alone, args.alone + 1), 1)[0]))
        return

    start, scores, memory = time.monotonic(), [], []
    for first in range(0, args.episodes, args.round):
        seeds = range(args.seed + first, args.seed + min(first + args.round, args.episodes))
        scores += play(predict, n_action_steps, seeds, args.num_envs)
        gc.collect()
        memory.append({"episodes": len(scores), "rss_mb": round(memory_mb(), 1), "objects": len(gc.get_objects())})
        print(memory[-1], flush=True)
    picked = np.linspace(0, args.episodes - 1, min(args.again, args.episodes)).round().astype(int).tolist()
    alone = {i: play_alone(args.checkpoint, args.seed + i) for i in picked}
    differing = {args.seed + i: [scores[i], alone[i]] for i in picked if not np.allclose(alone[i], scores[i], 1e-9, 0)}

    later = memory[len(memory) // 5 :]  # the first rounds fill caches
    slope = np.polyfit([m["episodes"] for m in later], [m["rss_mb"] for m in later], 1)[0] if len(later) > 1 else None
    write_json(
        args.output,
        {
            "episodes": len(scores),
            "steps": sum(length for _, _, length in scores),
            "seconds": round(time.monotonic() - start),
            "num_envs": args.num_envs,
            "seed": args.seed,
            "avg_max_reward": float(np.mean([reward for reward, _, _ in scores])),
            "rss_mb_first": memory[0]["rss_mb"],
            "rss_mb_last": memory[-1]["rss_mb"],
            "rss_mb_per_1000_episodes": None if slope is None else round(1000 * slope, 2),
            "seeds_played_again_alone": len(picked),
            "seeds_that_differ": differing,
            "versions": installed_versions(PUSHT) | {"pygame": version("pygame")},
            "memory": memory,
            "max_rewards": [reward for reward, _, _ in scores],
        },
    )
    print(args.output.read_text().partition('"memory"')[0])
    if differing:
        raise SystemExit(
            f"Seeds {list(differing)} have other scores in a new process: an episode depends on those before it."
        )


if __name__ == "__main__":
    main()
