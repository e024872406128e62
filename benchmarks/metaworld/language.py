"""Does a Meta-World policy follow its instruction? Success with rephrased instructions and with another task's.

    python benchmarks/metaworld/language.py --checkpoint checkpoints/metaworld-tiny --episodes 10 --seed 3000

Each task is played with its own instruction; with one from `UNSEEN`, which is not in the training data; with one from
`OUTSIDE`, most of whose words are not either; and, if another task has the same objects, with that task's instruction.
Writes `metaworld_language.json`.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from envs.metaworld import BENCHMARK, TASKS
from evaluate import find_backend, installed_versions, rollout_in_processes, write_json
from rollouts import success_rate

# Tasks with the same objects.
TWINS = {
    "reach": "push",
    "push": "pick-place",
    "pick-place": "reach",
    "window-open": "window-close",
    "window-close": "window-open",
    "drawer-open": "drawer-close",
    "drawer-close": "drawer-open",
    "door-open": "door-close",
    "door-close": "door-open",
    "door-lock": "door-unlock",
    "door-unlock": "door-lock",
    "faucet-open": "faucet-close",
    "faucet-close": "faucet-open",
    "handle-press": "handle-pull",
    "handle-pull": "handle-press",
    "handle-press-side": "handle-pull-side",
    "handle-pull-side": "handle-press-side",
    "coffee-push": "coffee-pull",
    "coffee-pull": "coffee-push",
    "stick-push": "stick-pull",
    "stick-pull": "stick-push",
    "assembly": "disassemble",
    "disassemble": "assembly",
}
UNSEEN = {
    "button-press": "Please press the button",
    "button-press-topdown": "Press the button from above",
    "button-press-topdown-wall": "Get past the wall and press the button from above",
    "button-press-wall": "Get past the wall and press the button",
    "coffee-button": "Press the button of the coffee machine",
    "dial-turn": "Turn the dial half way around",
    "door-close": "Push the door closed",
    "door-lock": "Rotate the door's lock clockwise",
    "door-open": "Open the door",
    "door-unlock": "Rotate the door's lock counter-clockwise",
    "drawer-close": "Close the drawer",
    "drawer-open": "Open the drawer, please",
    "faucet-close": "Turn the tap clockwise",
    "faucet-open": "Turn the tap counter-clockwise",
    "handle-press": "Press the handle",
    "handle-press-side": "Press the handle from the side",
    "handle-pull": "Pull up the handle",
    "handle-pull-side": "Pull up the handle from the side",
    "lever-pull": "Pull down the lever",
    "peg-unplug-side": "Pull the plug out",
    "plate-slide": "Slide the dish into the cabinet",
    "plate-slide-back": "Get the dish out of the cabinet",
    "plate-slide-back-side": "Get the dish sideways out of the cabinet",
    "plate-slide-side": "Slide the dish sideways into the cabinet",
    "reach": "Reach the goal",
    "reach-wall": "Get past the wall and reach the goal",
    "window-close": "Close the window",
    "window-open": "Open the window",
    "basketball": "Put the basketball into the hoop",
    "bin-picking": "Put the puck into the other bin",
    "box-close": "Close the box with the lid",
    "coffee-pull": "Pull the cup away from the coffee machine",
    "coffee-push": "Push the cup under the machine",
    "hammer": "Hammer the nail into the wall",
    "peg-insert-side": "Insert the peg into the box",
    "push-wall": "Get past the wall and push the puck to its goal",
    "soccer": "Kick the ball into the net",
    "sweep": "Sweep the cube off the table",
    "sweep-into": "Sweep the puck into the opening",
    "assembly": "Place the ring on the peg",
    "hand-insert": "Put the gripper into the opening",
    "pick-out-of-hole": "Pick the puck out of its hole",
    "pick-place": "Pick up the puck and place it at the goal",
    "push": "Push the puck over the table to its goal",
    "push-back": "Push the puck over the table to its goal",
    "disassemble": "Pull the nut off the peg",
    "pick-place-wall": "Bring the puck over the wall to its place",
    "shelf-place": "Place the cube on the shelf",
    "stick-pull": "Drag the box with the stick",
    "stick-push": "Shove the box with the stick",
}
# Three in five of these words are not in the training data; each instruction has at least one of them.
OUTSIDE = {
    "button-press": "Tap the round switch",
    "button-press-topdown": "Squash the switch from overhead",
    "button-press-topdown-wall": "Squash the switch from overhead, avoiding the barrier",
    "button-press-wall": "Tap the switch hidden by a barrier",
    "coffee-button": "Activate the espresso brewer",
    "dial-turn": "Spin the gauge to the opposite side",
    "door-close": "Make sure nobody can enter: the hatch must be shut",
    "door-lock": "Bolt the hatch with a right-hand twist",
    "door-open": "Let me look inside the strongbox",
    "door-unlock": "Unbolt the hatch with a left-hand twist",
    "drawer-close": "The desk compartment has to go back in",
    "drawer-open": "I want to see inside the desk compartment",
    "faucet-close": "Stop the spigot dripping",
    "faucet-open": "I'd like running water from the spigot",
    "handle-press": "Force the grip towards the floor",
    "handle-press-side": "Force the lateral grip towards the floor",
    "handle-pull": "Hoist the grip towards the ceiling",
    "handle-pull-side": "Hoist the lateral grip towards the ceiling",
    "lever-pull": "Yank the crank",
    "peg-unplug-side": "Disconnect the dowel",
    "plate-slide": "Shelve the frisbee inside the cupboard",
    "plate-slide-back": "Fetch the frisbee that is inside the cupboard",
    "plate-slide-back-side": "Fetch the frisbee laterally from inside the cupboard",
    "plate-slide-side": "Shelve the frisbee laterally inside the cupboard",
    "reach": "Hover at the marked spot",
    "reach-wall": "Hover at the marked spot beyond the barrier",
    "window-close": "It is cold, the pane should not let air in",
    "window-open": "Let fresh air in through the pane",
    "basketball": "Make a slam for two points",
    "bin-picking": "Transfer the disc between containers",
    "box-close": "Seal the carton",
    "coffee-pull": "Fetch my espresso",
    "coffee-push": "Prepare the tankard for an espresso",
    "hammer": "Pound the spike using a mallet",
    "peg-insert-side": "Connect the dowel with its socket",
    "push-wall": "Shift the disc towards the marked spot, avoiding the barrier",
    "soccer": "Play football and beat the keeper",
    "sweep": "Brush the disc onto the floor",
    "sweep-into": "Brush the disc so it falls through the gap",
    "assembly": "Thread the washer over the pole",
    "hand-insert": "Dip your fingers inside the cavity",
    "pick-out-of-hole": "Rescue the disc stuck inside the cavity",
    "pick-place": "Carry the disc through the air until it sits at the marked spot",
    "push": "Shift the disc along the surface towards the marked spot",
    "push-back": "Shift the disc along the surface towards the marked spot",
    "disassemble": "Separate the washer and the pole",
    "pick-place-wall": "Carry the disc above the barrier, then release it",
    "shelf-place": "Store the disc up on the rack",
    "stick-pull": "Fetch the flask with a rod",
    "stick-push": "Poke the flask with a rod",
}
INSTRUCTIONS = {
    "own": TASKS,
    "unseen": UNSEEN,
    "outside": OUTSIDE,
    "another": {task: TASKS[twin] for task, twin in TWINS.items()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/metaworld-tiny")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--told", nargs="+", default=list(INSTRUCTIONS), choices=list(INSTRUCTIONS))
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=3000)
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    results = {"checkpoint": args.checkpoint, "versions": installed_versions(BENCHMARK), "told": {}}
    for kind in args.told:
        instructions = INSTRUCTIONS[kind]
        tasks = [task for task in args.tasks if task in instructions]
        if not tasks:
            continue
        benchmark = replace(BENCHMARK, tasks=instructions)
        options = {"seeds": range(args.seed, args.seed + args.episodes), "num_envs": args.episodes}
        load_options = {"backend": find_backend(args.checkpoint)}
        result = rollout_in_processes(args.num_processes, args.checkpoint, benchmark, tasks, load_options, **options)
        successes = {task: [e.success for e in result.episodes if e.task == task] for task in tasks}
        by_task = {task: {"sentence": instructions[task], **success_rate(successes[task])} for task in tasks}
        results["told"][kind] = {**success_rate(result.successes), "by_task": by_task}
        print(f"{kind}: {results['told'][kind]['pc_success']:.1f} % of {len(result.successes)}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "metaworld_language.json", results)


if __name__ == "__main__":
    main()
