"""Success of a PushT policy when its task is rephrased in ways that it was not trained on.

    python benchmarks/pusht/wordings.py --checkpoint checkpoints/pusht-tiny --episodes 100 --seed 5000

Every instruction plays the same episodes. Writes `wordings.json` into the output folder.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from envs.pusht import BENCHMARK as PUSHT
from envs.pusht import TASK
from evaluate import installed_versions, load_policy, make_output_dir, make_predict, write_json
from rollouts import rollout

# None of them is in `envs.pusht.WORDINGS`.
UNSEEN = [
    "Push the block onto the target.",
    "Get the tee into its slot, please.",
    "align the two shapes",
    "Put that thing in its place!",
    "Cover the green area with the movable part.",
]
FIGURES = [f"{name}{end}" for name in ("pc_success", "avg_max_reward") for end in ("", "_low", "_high")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/pusht-tiny")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/wordings"))
    args = parser.parse_args()
    make_output_dir(parser, args.output_dir, ["wordings.json"])
    model, processor = load_policy(args.checkpoint)
    results = {"checkpoint": args.checkpoint, "episodes": args.episodes, "seed": args.seed}
    results |= {"versions": installed_versions(PUSHT), "sentences": {}}
    predict, seeds = make_predict(model, processor), range(args.seed, args.seed + args.episodes)
    for task in (TASK, *UNSEEN):
        benchmark = replace(PUSHT, tasks={"pusht": task})
        metrics = rollout(benchmark, predict, seeds, model.config.n_action_steps, progress=True).metrics()
        results["sentences"][task] = {name: round(metrics[name], 3) for name in FIGURES}
        print("{pc_success:5.1f} %  {avg_max_reward:.3f}  {task}".format(**metrics, task=task))
        write_json(args.output_dir / "wordings.json", results)


if __name__ == "__main__":
    main()
