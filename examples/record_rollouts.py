"""Record a policy's PushT rollouts as a LeRobot v3.0 data set, in the layout of the Hub's `lerobot/pusht`.

    python examples/record_rollouts.py --checkpoint checkpoints/pusht-tiny --episodes 50 --output_dir outputs/rollouts

Episode i resets its environment with seed + i. A frame holds the observation, the action and its reward. With
`--action_stride 2 --only_successes`, the episodes that the policy solves at twice its speed become demonstrations for
a faster policy.
"""

import argparse
from pathlib import Path
from typing import Any

import interrupt  # noqa: F401 - before the slow imports
import numpy as np
from envs.pusht import BENCHMARK as PUSHT
from envs.pusht import CONTROL_HZ, IMAGE_SIZE, MAX_EPISODE_STEPS, TASK
from evaluate import check_checkpoint, check_counts, error_line, load_policy, make_predict
from lerobot_writer import IMAGE_KEY, write_dataset
from rollouts import Episode, Predict, rollout
from tqdm import tqdm

from smolandfast.files_smolandfast import check_new_folder

DATASET = {
    "fps": CONTROL_HZ,
    "robot_type": "pusht",
    # x and y; these are the names in the Hub's data set, so that recordings can be joined with it.
    "axes": {"observation.state": ["motor_0", "motor_1"], "action": ["motor_0", "motor_1"]},
    "image_size": IMAGE_SIZE,
}


def play(predict: Predict, seed: int, n_action_steps: int, max_steps: int) -> dict:
    """Record one episode, see [`rollouts.rollout`].

    Returns:
        Arrays of T steps by feature: `observation.image` uint8 `(T, 96, 96, 3)`, `observation.state` and `action`
        float32 `(T, 2)` in the simulator's units, `next.reward` `(T,)`, `next.done`, `next.success`; and `task`, the
        instruction.
    """
    steps = []

    def keep(episode: Episode, images: list[np.ndarray], state: np.ndarray, action: np.ndarray) -> None:
        reward = np.float32(episode.rewards[-1])
        steps.append((images[0], state, action, reward, episode.done, episode.success))

    rollout(PUSHT, predict, [seed], n_action_steps, max_steps=max_steps, on_step=keep)
    names = (IMAGE_KEY, "observation.state", "action", "next.reward", "next.done", "next.success")
    arrays = {name: np.array(values) for name, values in zip(names, zip(*steps, strict=True), strict=True)}
    return arrays | {"task": TASK}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Record a policy's PushT rollouts as a LeRobot v3.0 data set.")
    parser.add_argument("--checkpoint", required=True, help="folder that train.py wrote, or a Hub id")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for the data set")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=2000, help="episode i resets its environment with seed + i (2000)")
    parser.add_argument("--n_action_steps", type=int, help="actions executed of each chunk (the checkpoint's own)")
    parser.add_argument("--action_stride", type=int, default=1, help="2 executes every second action of a chunk (1)")
    parser.add_argument("--only_successes", action="store_true", help="leave out the episodes that are not solved")
    parser.add_argument("--max_steps", type=int, default=MAX_EPISODE_STEPS, help=f"({MAX_EPISODE_STEPS})")
    args = parser.parse_args(argv)
    check_counts(parser, args, episodes=1, max_steps=1, seed=0, n_action_steps=1, action_stride=1)
    with error_line(parser, "--output_dir: "):
        check_new_folder(args.output_dir)
    check_checkpoint(parser, args, PUSHT)
    with error_line(parser, f"--checkpoint {args.checkpoint} cannot be used: "):
        model, processor = load_policy(args.checkpoint)
    n_action_steps = args.n_action_steps or model.config.n_action_steps
    num_actions = len(range(0, model.config.chunk_size, args.action_stride))
    if n_action_steps > num_actions:
        parser.error(f"--n_action_steps is {n_action_steps}, a chunk has {num_actions} such actions. Give fewer.")
    predict_all = make_predict(model, processor)

    def predict(*observation: Any) -> np.ndarray:
        return predict_all(*observation)[:, :: args.action_stride]

    seeds = tqdm(range(args.seed, args.seed + args.episodes), unit="episode")
    episodes = (play(predict, seed, n_action_steps, args.max_steps) for seed in seeds)
    if args.only_successes:
        episodes = (episode for episode in episodes if episode["next.success"][-1])
    try:
        with error_line(parser):
            info = write_dataset(args.output_dir, episodes, **DATASET)
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted. Nothing was written.\n")
    print(f"{info['total_episodes']} episodes, {info['total_frames']} frames in {args.output_dir}")


if __name__ == "__main__":
    main()
