"""Score a Meta-World policy by task and difficulty, and classify its failures, as reported in the docs.

    python benchmarks/metaworld/report.py --checkpoint checkpoints/metaworld-tiny --episodes 10 --seed 1000

A deployed policy (`export_policy.py`) gives the same chunks in half of the time.

Writes `metaworld.json`, `metaworld.png` with the last frame of each task's first episode, and `metaworld_failures.png`
with failures of each kind.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from envs.metaworld import BENCHMARK, TASKS
from evaluate import (
    find_backend,
    installed_versions,
    load_predict,
    make_output_dir,
    rollout_in_processes,
    summary,
    write_json,
)
from PIL import Image
from rollouts import Episode, draw_grid, draw_tile, write_contact_sheet

NEAR, NEAR_GOAL = 0.05, 0.1  # metres; most tasks are solved at about five centimetres


def kind_of_ending(episode: Episode) -> str:
    """Solved; or whether the object was near its goal, moved elsewhere, touched by the hand, or not reached."""
    if episode.success:
        return "solved"
    poses = np.array(episode.poses)  # (T, 21), see `MetaworldScene.poses`
    hand, thing, goal = poses[:, :3], poses[:, 4:7], poses[:, 18:]
    if episode.task.startswith("reach"):
        thing = hand
    if np.linalg.norm(thing - goal, axis=1).min() < NEAR_GOAL:
        return "near its goal"
    if np.linalg.norm(thing - thing[0], axis=1).max() > NEAR:
        return "moved elsewhere"
    if np.linalg.norm(hand - thing, axis=1).min() < NEAR:
        return "touched"
    return "not reached"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/metaworld-tiny")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--episodes", type=int, default=10, help="of each task (10)")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--num_envs", type=int, default=5, help="episodes played side by side (5)")
    parser.add_argument("--num_processes", type=int, default=os.cpu_count())
    parser.add_argument("--examples", type=int, default=3, help="filmed failures of each kind (3)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/metaworld-report"))
    args = parser.parse_args()
    names = ["metaworld.json", "metaworld.png", "metaworld_failures.png"]
    make_output_dir(parser, args.output_dir, names)
    load_options = {"backend": find_backend(args.checkpoint)}
    n_action_steps = load_predict(args.checkpoint, **load_options).n_action_steps
    options = {"seeds": range(args.seed, args.seed + args.episodes), "num_envs": args.num_envs, "record": 1}
    result = rollout_in_processes(args.num_processes, args.checkpoint, BENCHMARK, args.tasks, load_options, **options)
    kinds = [kind_of_ending(episode) for episode in result.episodes]
    metrics = {
        "benchmark": BENCHMARK.name,
        "checkpoint": args.checkpoint,
        "n_action_steps": n_action_steps,
        **load_options,
        **{"dtype": "float32", "device": "cpu", "num_threads": 1, "num_envs": args.num_envs, "do_sample": False},
        "versions": installed_versions(BENCHMARK),
        **result.metrics(),
        "kinds": kinds,
        "counts": dict(Counter(kinds).most_common()),
    }
    write_json(args.output_dir / "metaworld.json", metrics)
    print(summary(metrics), metrics["counts"], sep="\n")
    rates = {task: f"{rate['pc_success'] / 100 * rate['n_episodes']:.0f}/{rate['n_episodes']}"
             for task, rate in metrics["by_task"].items()}  # fmt: skip
    last_frames = [
        draw_tile(e, len(e.frames) - 1, 256, BENCHMARK, title=f"{e.task}  {rates[e.task]}", score="")
        for e in result.recordings
    ]
    draw_grid(last_frames, columns=10).save(args.output_dir / "metaworld.png")
    filmed = [(kind, e) for kind, e in zip(kinds, result.episodes, strict=True) if e.is_filmed and not e.success]
    chosen = [pair for kind in sorted(set(kinds)) for pair in [p for p in filmed if p[0] == kind][: args.examples]]
    if chosen:
        titles = [f"{episode.task}: {kind}" for kind, episode in chosen]
        sheet = args.output_dir / "metaworld_failures.png"
        write_contact_sheet(sheet, [episode for _, episode in chosen], BENCHMARK, titles=titles)
    for path in args.output_dir.glob("metaworld*.png"):  # a palette makes the files four times smaller
        Image.open(path).quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
