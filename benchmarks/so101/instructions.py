"""Does an SO-101 policy pick up the cube that its instruction names?

    python benchmarks/so101/instructions.py --checkpoint checkpoints/so101-tiny --scenes 200 --seed 20000

Plays each scene with all three instructions; then, to see what the policy relies on, with other words, with an
instruction that names no cube, with cubes that all have the named colour, with images of full quality, and with one
camera black. Writes `so101_instructions.json`.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
import numpy as np
from envs.so101 import BENCHMARK
from envs.so101.simulator import COLORS, LIFTED, SO101Scene, cube_poses
from evaluate import (
    check_counts,
    find_backend,
    find_checkpoint,
    installed_versions,
    load_checked,
    rollout_in_processes,
    write_json,
)
from rollouts import RolloutResult, success_rate

from smolandfast.files_smolandfast import read_json


class OneColor(SO101Scene):
    """A scene in which all cubes have the named colour. A policy that lifts any of them solves a third."""

    def __init__(self, task: str):
        super().__init__(task)
        slots = self.env._slots
        for slot in slots:
            self.model.geom_rgba[slot.geom_ids] = self.model.geom_rgba[slots[COLORS.index(task)].geom_ids]


class WithoutCamera(SO101Scene):
    """A scene one of whose cameras sees nothing."""

    def __init__(self, task: str, camera: int):
        super().__init__(task)
        self.camera = camera

    def images(self) -> list[np.ndarray]:
        images = super().images()
        images[self.camera] = np.zeros_like(images[self.camera])
        return images


CONDITIONS = {
    "as trained": BENCHMARK,
    "other words": replace(BENCHMARK, tasks={color: f"Grab the {color} one." for color in COLORS}),
    "no colour": replace(BENCHMARK, tasks=dict.fromkeys(COLORS, "Pick up the cube.")),
    "one colour": replace(BENCHMARK, make_scene=OneColor),
    "full quality": replace(BENCHMARK, make_scene=partial(SO101Scene, full_render=True)),
    "front camera black": replace(BENCHMARK, make_scene=partial(WithoutCamera, camera=0)),
    "wrist camera black": replace(BENCHMARK, make_scene=partial(WithoutCamera, camera=1)),
}


def lifted_others(result: RolloutResult) -> list[bool]:
    """Whether each episode lifted a cube that was not named."""
    lifted = []
    for episode in result.episodes:
        heights = cube_poses(np.array(episode.poses))[:, :, 2].max(axis=0)
        others = [i for i, color in enumerate(COLORS) if color != episode.task]
        lifted.append(bool((heights[others] > LIFTED).any()))
    return lifted


def measure(result: RolloutResult) -> dict[str, Any]:
    """Shares of episodes solved, of scenes with all instructions solved, and of episodes that lifted another cube."""
    solved = np.array(result.successes).reshape(len(COLORS), -1)  # task by task, in the order of the seeds
    by_task = {color: success_rate(row.tolist()) for color, row in zip(COLORS, solved, strict=True)}
    return {
        "solved": success_rate(result.successes),
        "all_three": success_rate(solved.all(axis=0).tolist()),
        "other_lifted": success_rate(lifted_others(result)),
        "by_task": by_task,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/so101-tiny")
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--num_envs", type=int, default=8)
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    check_counts(parser, args, scenes=1, seed=0, num_envs=1, num_processes=1)
    find_checkpoint(parser, args)
    backend = find_backend(args.checkpoint)
    policy = load_checked(parser, BENCHMARK, args.checkpoint, backend=backend)
    measured = {name: getattr(args, name) for name in ("checkpoint", "seed", "scenes", "num_envs")}
    measured |= {"n_action_steps": policy.n_action_steps, "versions": installed_versions(BENCHMARK)}
    path = args.output_dir / "so101_instructions.json"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = measured | {"conditions": {}}
    if path.exists():  # other conditions of the same measurement are kept
        earlier = read_json(path)
        results = earlier if {name: earlier.get(name) for name in measured} == measured else results
    options = {"seeds": range(args.seed, args.seed + args.scenes), "num_envs": args.num_envs}
    options |= {"n_action_steps": policy.n_action_steps, "load_options": {"backend": backend}}
    for name in args.conditions:
        rates = measure(rollout_in_processes(args.num_processes, args.checkpoint, CONDITIONS[name], COLORS, **options))
        results["conditions"][name] = rates
        write_json(path, results)
        solved, all_three, other = (rates[key]["pc_success"] for key in ("solved", "all_three", "other_lifted"))
        print(
            f"{name}: {solved:.1f} % solved, {all_three:.1f} % of scenes with all three, {other:.1f} % lifted another"
        )


if __name__ == "__main__":
    main()
