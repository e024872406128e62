"""Success and smoothness on PushT against the inference delay, in a simulation that does not wait for the policy.

    python examples/export_policy.py --checkpoint checkpoints/pusht-tiny --output_dir deployed
    python benchmarks/pusht/delay.py --checkpoint deployed --episodes 50 --num_processes 2
    python benchmarks/pusht/delay.py --checkpoint deployed --max_tokens 1 2 3 4 6 8 --delays 0 --strategies switch

Plays each delay, in control steps of 0.1 s, with each strategy (`deployment.loop.STRATEGIES`), on the same seeds. With
`--max_tokens`, chunks end after so many tokens and are timed; nothing else should then run on the machine. The same
command continues after an interruption. Writes `benchmarks/results/delay.json` and `assets/delay.png`, or
`anytime.json`.
"""

import argparse
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "speed"))
from bench import RESULTS, seconds
from envs.pusht import BENCHMARK, CONTROL_HZ
from evaluate import find_backend, installed_versions, load_predict, map_in_processes, write_json
from rollouts import rollout

from smolandfast.deployment.loop import STRATEGIES

NAMES = {
    "wait": "stands still during inference",
    "switch": "keeps moving, then switches",
    "blend": "keeps moving, averages the overlap (LeRobot)",
}


def measure(case: tuple[str, int, int | None], checkpoint: str, backend: str | None, seeds: range) -> dict[str, Any]:
    """Play one combination of strategy, delay and token limit."""
    strategy, delay, max_tokens = case
    policy = load_predict(checkpoint, backend, max_tokens=max_tokens)
    options = {"n_action_steps": policy.n_action_steps, "num_envs": 1}
    result = rollout(BENCHMARK, policy.predict, seeds, delay=delay, strategy=strategy, **options)
    metrics = result.metrics()
    names = ("pc_success", "pc_success_low", "pc_success_high", "n_episodes", "avg_max_reward")
    return {
        "checkpoint": checkpoint,
        "strategy": strategy,
        "delay": delay,
        "max_tokens": max_tokens,
        **{name: metrics[name] for name in names},
        "mean_steps": float(np.mean(result.lengths)),
        **result.smoothness(),
        "successes": result.successes,
    }


def time_chunks(checkpoint: str, backend: str | None, limits: list[int | None], seed: int) -> dict[str, float]:
    """Milliseconds of a chunk for each token limit, on one thread: medians, averaged over an episode's chunks."""
    torch.set_num_threads(1)
    policy, observations = load_predict(checkpoint, backend), []

    def predict(*observation: Any) -> np.ndarray:
        observations.append(observation)
        return policy.predict(*observation)

    rollout(BENCHMARK, predict, [seed], policy.n_action_steps)
    predicts = [load_predict(checkpoint, backend, max_tokens=limit).predict for limit in limits]
    times = [seconds(*[partial(predict, *observation) for predict in predicts]) for observation in observations]
    return {str(limit): 1e3 * float(time) for limit, time in zip(limits, np.mean(times, axis=0), strict=True)}


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Plot success, and the jumps between commanded actions, against the delay."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lines = {}
    for case in sorted(cases, key=lambda case: case["delay"]):
        lines.setdefault(NAMES[case["strategy"]], []).append(case)
    for label, points in lines.items():
        seconds = [case["delay"] / CONTROL_HZ for case in points]
        success = np.array([case["pc_success"] for case in points])
        margins = [success - [case["pc_success_low"] for case in points]]
        margins += [np.array([case["pc_success_high"] for case in points]) - success]
        left.errorbar(seconds, success, yerr=margins, marker="o", capsize=3, label=label)
        right.plot(seconds, [case["jump_95"] for case in points], marker="o", label=label)
    left.set(xlabel="seconds that a chunk takes", ylabel="success, %", ylim=(0, 100))
    right.set(xlabel="seconds that a chunk takes", ylabel="95 % of the jumps are below, pixels of 512", ylim=(0, None))
    left.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/pusht-tiny", help="a checkpoint, or a deployed policy")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=8000)
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 1, 2, 3, 4, 6, 8])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--max_tokens", type=int, nargs="+", default=[None])
    parser.add_argument("--num_processes", type=int, default=1)
    args = parser.parse_args()
    path = RESULTS / ("delay.json" if args.max_tokens == [None] else "anytime.json")
    backend = find_backend(args.checkpoint)
    setting = {"seed": args.seed, "episodes": args.episodes, "backend": backend}
    setting["versions"] = installed_versions(BENCHMARK)
    results = json.loads(path.read_text()) if path.is_file() else setting | {"cases": []}
    if {name: results[name] for name in setting} != setting:
        parser.error(f"{path} was measured with other options. Move it away.")
    done = {
        (case["strategy"], case["delay"], case["max_tokens"])
        for case in results["cases"]
        if case["checkpoint"] == args.checkpoint
    }
    cases = [c for c in itertools.product(args.strategies, args.delays, args.max_tokens) if c not in done]
    seeds = range(args.seed, args.seed + args.episodes)
    play = partial(measure, checkpoint=args.checkpoint, backend=backend, seeds=seeds)
    for case in map_in_processes(args.num_processes, play, sorted(cases, key=lambda case: case[1])):
        results["cases"].append(case)
        write_json(path, results)
        print({name: value for name, value in case.items() if name != "successes"}, flush=True)
    if args.max_tokens == [None]:
        own = [case for case in results["cases"] if case["checkpoint"] == args.checkpoint]
        draw(own, RESULTS.parents[1] / "assets/delay.png")
    else:
        results["ms_of_a_chunk"] = time_chunks(args.checkpoint, backend, [*args.max_tokens, None], args.seed)
        write_json(path, results)
        print(results["ms_of_a_chunk"])


if __name__ == "__main__":
    main()
