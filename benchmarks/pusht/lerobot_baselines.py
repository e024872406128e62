"""Train LeRobot's Diffusion Policy and ACT on our demonstrations, with as much CPU time as our policy.

    make .venv-lerobot/installed && .venv-lerobot/bin/pip install diffusers
    .venv-lerobot/bin/python benchmarks/pusht/lerobot_baselines.py --dataset_root path/to/pusht --cpu_hours 1.0

`lerobot-train` gets image observations, LeRobot's settings for each policy, backbones with random weights, and bf16
where the CPU has it. A few steps are timed first, to choose the number of steps that fills the CPU hours.
`lerobot-eval` plays the result on seeds that we tuned nothing on. Writes `benchmarks/results/lerobot_baselines.json`
and `.md`; `--policies` runs some of them and keeps the other rows.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class

RESULTS = Path(__file__).resolve().parents[1] / "results/lerobot_baselines"
OPTIONS = {
    # Horizon and steps of Chi et al. 2023, LeRobot's defaults up to 0.5.
    "diffusion": ["--policy.horizon=16", "--policy.n_action_steps=8", "--policy.use_group_norm=true"]
    + ["--policy.crop_shape=[84, 84]", "--policy.num_inference_steps=10", "--policy.noise_scheduler_type=DDIM"],
    "act": [],
}


def lerobot(command: str, *options: str) -> float:
    """Run one of LeRobot's commands on the CPU; returns the CPU seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    executable = Path(sys.executable).parent / command
    subprocess.run([executable, *options], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train(args: argparse.Namespace, name: str, options: list[str], steps: int, output_dir: Path) -> float:
    return lerobot(
        "lerobot-train",
        *(f"--policy.{key}" for key in (f"type={name}", "device=cpu", f"use_amp={args.bf16}", "push_to_hub=false")),
        "--policy.pretrained_backbone_weights=null",
        "--dataset.repo_id=local/demonstrations",
        f"--dataset.root={args.dataset_root}",
        f"--batch_size={args.batch_size}",
        f"--steps={steps}",
        f"--save_freq={steps}",
        f"--log_freq={max(steps // 20, 1)}",
        "--num_workers=0",
        f"--output_dir={output_dir}",
        *options,
    )


def train_for_hours(args: argparse.Namespace, name: str, options: list[str], folder: Path) -> dict:
    """Train for about `args.cpu_hours` in `folder / "train"`; returns time and samples."""
    few, more = 2, 6
    seconds = [train(args, name, options, steps, folder / f"timing-{steps}") for steps in (few, more)]
    seconds_a_step = (seconds[1] - seconds[0]) / (more - few)
    steps = max(int(args.cpu_hours * 3600 / seconds_a_step), 1)
    spent = train(args, name, options, steps, folder / "train")
    return {
        "cpu_hours": round(spent / 3600, 2),
        "samples": steps * args.batch_size,
        "samples_per_cpu_second": round(args.batch_size / seconds_a_step, 2),
        "bf16_training": args.bf16 == "true",
    }


def chunk_seconds(name: str, folder: Path, repeats: int = 10) -> tuple[float, int]:
    """Median seconds of a chunk for one observation, and the number of parameters."""
    policy = get_policy_class(name).from_pretrained(folder).eval()
    shapes = {key: feature.shape for key, feature in PreTrainedConfig.from_pretrained(folder).input_features.items()}
    observation = {key: torch.rand(1, *shape) for key, shape in shapes.items()}
    times = []
    for _ in range(repeats):
        policy.reset()  # drops the rest of the chunk
        start = time.perf_counter()
        with torch.inference_mode():
            policy.select_action(dict(observation))
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2], sum(p.numel() for p in policy.parameters())


def run(args: argparse.Namespace, name: str, folder: Path) -> dict:
    training = train_for_hours(args, name, OPTIONS[name], folder)
    checkpoint = folder / "train/checkpoints/last/pretrained_model"
    lerobot(
        "lerobot-eval",
        f"--policy.path={checkpoint}",
        "--policy.device=cpu",
        "--policy.use_amp=false",  # otherwise ACT's actions are bf16, which lerobot-eval cannot convert
        "--env.type=pusht",
        f"--eval.n_episodes={args.episodes}",
        "--eval.batch_size=10",
        "--eval.use_async_envs=false",
        f"--seed={args.seed}",
        f"--output_dir={folder / 'eval'}",
    )
    scores = json.loads((folder / "eval/eval_info.json").read_text())["overall"]
    chunk, parameters = chunk_seconds(name, checkpoint)
    return {
        "parameters_millions": round(parameters / 1e6, 1),
        **training,
        "avg_max_reward": round(scores["avg_max_reward"], 3),
        "pc_success": round(scores["pc_success"], 1),
        "episodes": args.episodes,
        "seed": args.seed,
        "ms_per_chunk": round(chunk * 1e3, 1),
        "versions": {package: version(package) for package in ("lerobot", "torch", "gym_pusht")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_root", type=Path, required=True)
    parser.add_argument("--policies", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--cpu_hours", type=float, default=1.0, help="training time of each, in hours of one core")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--bf16", choices=("true", "false"), default="true", help="autocast while training")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=4000, help="of the first episode")
    parser.add_argument("--output_dir", type=Path, help="keep the checkpoints in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.policies:
            row = run(args, name, (args.output_dir or Path(scratch)) / name)
            path = RESULTS.with_suffix(".json")
            rows = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(rows | {name: row}, indent=2) + "\n")
    rows = json.loads(RESULTS.with_suffix(".json").read_text())
    columns = [column for column in next(iter(rows.values())) if column != "versions"]
    lines = [f"| policy | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(str(row[column]) for column in columns)} |" for name, row in rows.items()]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
