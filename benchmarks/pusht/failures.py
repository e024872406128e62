"""Failure modes of a PushT policy: episodes by kind of ending, and a contact sheet of examples.

    python benchmarks/pusht/failures.py --checkpoint checkpoints/pusht-tiny --episodes 200 --seed 2000

Writes `failures.json` and `failures.png`. The examples are played again to be filmed. Rounding may depend on the
batch, so each is labelled with the ending of its second run.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from envs.pusht import BENCHMARK as PUSHT
from envs.pusht import CONTROL_HZ
from evaluate import load_policy, make_output_dir, make_predict, write_json
from rollouts import Episode, rollout, write_contact_sheet

NEAR = 0.85  # reward: 81 % covered
LAST = 5 * CONTROL_HZ  # steps


def kind_of_ending(episode: Episode) -> str:
    """Whether the episode is solved, was near the target at its end or before, and whether the T still moves."""
    if episode.success:
        return "solved"
    poses = np.array(episode.poses[-LAST:])
    is_still = np.ptp(poses[:, :2], axis=0).max() < 2 and np.ptp(poses[:, 2]) < np.radians(2)
    if episode.rewards[-1] >= NEAR:
        return "stops near" if is_still else "corrects near"
    if max(episode.rewards) >= NEAR:
        return "pushed away"
    return "stops far" if is_still else "late"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/pusht-tiny")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2000)
    parser.add_argument("--examples", type=int, default=2, help="filmed episodes of each kind")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/failures"))
    args = parser.parse_args()
    make_output_dir(parser, args.output_dir, ["failures.json", "failures.png"])
    model, processor = load_policy(args.checkpoint)
    predict = make_predict(model, processor)
    steps = model.config.n_action_steps
    result = rollout(PUSHT, predict, range(args.seed, args.seed + args.episodes), steps, progress=True)
    kinds = [kind_of_ending(episode) for episode in result.episodes]
    chosen = [
        [seed for seed, kind in zip(result.seeds, kinds, strict=True) if kind == name][: args.examples]
        for name in sorted(set(kinds) - {"solved"})
    ]
    counts = dict(Counter(kinds).most_common())
    write_json(args.output_dir / "failures.json", {"counts": counts, "seeds": result.seeds, "kinds": kinds})
    if seeds := sum(chosen, []):
        again = rollout(PUSHT, predict, seeds, steps, record=len(seeds))
        titles = [f"{episode.seed}: {kind_of_ending(episode)}" for episode in again.episodes]
        write_contact_sheet(args.output_dir / "failures.png", again.recordings, PUSHT, titles=titles)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
