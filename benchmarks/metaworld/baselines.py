"""Train LeRobot's ACT on the demonstrations of one Meta-World task, with as much CPU time as our policy.

    python examples/collect.py --benchmark metaworld --output_dir outputs/hammer --tasks hammer --episodes 50
    make .venv-lerobot/installed && .venv-lerobot/bin/pip install metaworld==3.0.0 mujoco==3.3.0
    .venv-lerobot/bin/python benchmarks/metaworld/baselines.py --task hammer --dataset_root outputs/hammer

`lerobot-train` gets image and state, but not the data set's object positions. Chunks have our size, the ResNet starts
from random weights, and the learning rate suits hours instead of days. The evaluation has the same seeds, images and
eight actions of each chunk. ACT takes no instruction, so each task is trained alone. Adds a row to
`benchmarks/results/metaworld_baselines.json`.
"""

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "pusht"))
from envs.metaworld import BENCHMARK, IMAGE_SIZE, STATE_DIM, TASKS
from lerobot_baselines import train_for_hours
from rollouts import Predict, rollout

RESULTS = Path(__file__).resolve().parents[1] / "results/metaworld_baselines.json"
INPUTS = {
    "observation.image": {"type": "VISUAL", "shape": [3, IMAGE_SIZE, IMAGE_SIZE]},
    "observation.state": {"type": "STATE", "shape": [STATE_DIM]},
}
CHUNK_SIZE, N_ACTION_STEPS = (BENCHMARK.preset[name] for name in ("chunk_size", "n_action_steps"))


def load_predict(folder: Path) -> tuple[Predict, int]:
    """The trained policy and its number of parameters."""
    policy = get_policy_class("act").from_pretrained(folder).eval()
    prepare, finish = make_pre_post_processors(policy.config, pretrained_path=str(folder))

    def predict(images: list[list[np.ndarray]], states: np.ndarray, texts: list[str]) -> np.ndarray:
        pixels = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2) / 255
        observation = {"observation.image": pixels, "observation.state": torch.from_numpy(states)}
        with torch.inference_mode():
            chunks = finish(policy.predict_action_chunk(prepare(observation)))
        return chunks.numpy()  # (B, CHUNK_SIZE, 4)

    return predict, sum(p.numel() for p in policy.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--dataset_root", type=Path, required=True, help="demonstrations, every step rendered")
    parser.add_argument("--cpu_hours", type=float, default=0.25, help="training time, in hours of one core")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="LeRobot's 1e-5 is for 100,000 steps")
    parser.add_argument("--bf16", choices=("true", "false"), default="true", help="autocast while training")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1000, help="of the first episode")
    parser.add_argument("--output_dir", type=Path, help="keep the checkpoint in this folder")
    args = parser.parse_args()
    options = [
        f"--policy.input_features={json.dumps(INPUTS)}",
        f"--policy.chunk_size={CHUNK_SIZE}",
        f"--policy.n_action_steps={N_ACTION_STEPS}",
        f"--policy.optimizer_lr={args.learning_rate}",
        f"--policy.optimizer_lr_backbone={args.learning_rate}",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.output_dir or Path(scratch)
        training = train_for_hours(args, "act", options, folder)
        predict, parameters = load_predict(folder / "train/checkpoints/last/pretrained_model")
    seeds = range(args.seed, args.seed + args.episodes)
    result = rollout(BENCHMARK, predict, seeds, N_ACTION_STEPS, [args.task], num_envs=5, progress=True)
    metrics = result.metrics()
    row = {
        "policy": "act",
        "task": args.task,
        "parameters_millions": round(parameters / 1e6, 1),
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        **training,
        **{name: getattr(args, name) for name in ("episodes", "seed")},
        **{name: metrics[name] for name in ("pc_success", "pc_success_low", "pc_success_high", "successes")},
        "versions": {package: version(package) for package in ("lerobot", "torch", "metaworld", "mujoco")},
    }
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*rows, row], indent=2) + "\n")
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
