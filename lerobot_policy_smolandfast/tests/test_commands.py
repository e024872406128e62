"""LeRobot's own commands, offline, on the PushT demonstrations: train, evaluate, resume, convert."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, SmolVLMConfig, SmolVLMForConditionalGeneration

from lerobot_policy_smolandfast import SMOLANDFASTPolicy

# The command of the README, and what makes it short and offline.
COMMAND = (
    "--dataset.repo_id=lerobot/pusht --policy.type=smolandfast --env.type=pusht --policy.push_to_hub=False "
    "--wandb.enable=True --env_eval_freq=1000 --steps=30000 --batch_size=64 --log_freq=50 --eval.batch_size=32 "
    "--eval.n_episodes=64"
)
SHORT = {"steps": 16, "batch_size": 8, "log_freq": 4, "eval.batch_size": 2, "eval.n_episodes": 2, "env_eval_freq": 16}
SYNCHRONOUS = {"eval.use_async_envs": "false"}


def run(command: str, options: dict) -> str:
    """Run a command of this environment and return what it printed."""
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_ERROR_REPORTING": "false"}
    result = subprocess.run(
        [Path(sys.executable).with_name(command), *(f"--{name}={value}" for name, value in options.items())],
        env=os.environ | offline,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


def losses(log: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step:(\d+) .*? loss:([\d.]+)", log)}


def is_video(path: Path) -> bool:
    return path.stat().st_size > 1000 and path.read_bytes()[4:8] == b"ftyp"


def offline_options(shared: Path) -> dict:
    return {
        "dataset.root": shared / "data/pusht",
        "dataset.video_backend": "pyav",
        "wandb.mode": "offline",
        "num_workers": 0,
        "policy.device": "cpu",
    }


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory) -> tuple[Path, str]:
    """The output folder of a short training of the tiny preset, and what it printed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = dict(option.removeprefix("--").split("=") for option in COMMAND.split()) | offline_options(shared)
    tiny = {"policy.vlm_model_name": "tiny", "policy.relative_actions": "true", "policy.text_learning_rate": 1e-3}
    options |= SHORT | SYNCHRONOUS | tiny | {"env.episode_length": 60, "output_dir": folder}
    return folder, run("lerobot-train", options)


@pytest.fixture(scope="module")
def checkpoint(trained) -> Path:
    return trained[0] / "checkpoints/last/pretrained_model"


def test_training_lowers_the_loss_and_evaluates(trained):
    folder, log = trained
    found = losses(log)
    assert list(found) == [4, 8, 12, 16] and found[16] < found[4] - 0.5
    assert "'avg_max_reward':" in log and "'pc_success':" in log
    videos = list((folder / "eval").rglob("*.mp4"))
    assert len(videos) == 2 and all(map(is_video, videos))
    assert any((folder / "wandb").glob("offline-run-*"))


def test_a_checkpoint_is_evaluated(checkpoint, tmp_path):
    options = {"policy.path": checkpoint, "env.type": "pusht", "env.episode_length": 60, "output_dir": tmp_path}
    options |= {"eval.batch_size": 2, "eval.n_episodes": 2, "policy.device": "cpu", "policy.n_action_steps": 8}
    run("lerobot-eval", options | SYNCHRONOUS)
    overall = json.loads((tmp_path / "eval_info.json").read_text())["overall"]
    assert overall["n_episodes"] == 2 and 0 <= overall["avg_max_reward"] <= 1 and 0 <= overall["pc_success"] <= 100
    videos = list(tmp_path.rglob("*.mp4"))
    assert len(videos) == 2 and all(map(is_video, videos))


def test_training_resumes_where_it_stopped(trained, checkpoint):
    before = losses(trained[1])
    options = {"config_path": checkpoint / "train_config.json", "resume": "true", "steps": 24, "env_eval_freq": 0}
    found = losses(run("lerobot-train", options))
    assert list(found) == [20, 24] and found[24] < before[4] - 0.5
    assert {path.name for path in (trained[0] / "checkpoints").iterdir()} == {"000016", "000024", "last"}
    for step in ("000016", "000024"):
        pipeline = trained[0] / "checkpoints" / step / "pretrained_model/policy_preprocessor.json"
        names = [step["registry_name"] for step in json.loads(pipeline.read_text())["steps"]]
        assert names.index("smolandfast_processor") < names.index("device_processor")


def test_a_checkpoint_converts_to_transformers_and_back(checkpoint, tmp_path):
    for direction, source, target in (
        ("transformers", checkpoint, tmp_path / "policy"),
        ("lerobot", tmp_path / "policy", tmp_path / "again"),
    ):
        module = "lerobot_policy_smolandfast.convert_checkpoint"
        arguments = ["--to", direction, "--checkpoint", source, "--output_dir", target]
        subprocess.run([sys.executable, "-m", module, *arguments], check=True)
    rng = np.random.default_rng(0)
    images, states = rng.integers(0, 256, (4, 96, 96, 3), dtype=np.uint8), rng.uniform(100, 400, (4, 2))
    model = AutoModel.from_pretrained(tmp_path / "policy", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "policy", trust_remote_code=True)
    ids = model.generate(**processor(images=images, state=states))
    expected = processor.post_process_actions(ids)
    observation = {
        "observation.image": torch.tensor(images).permute(0, 3, 1, 2) / 255,
        "observation.state": torch.tensor(states),
        "task": [""] * 4,
    }
    for folder in (checkpoint, tmp_path / "again"):
        policy = SMOLANDFASTPolicy.from_pretrained(folder)
        np.testing.assert_array_equal(policy.predict_action_chunk(observation), expected)


def test_smolvlm2_trains_with_the_universal_tokenizer(shared, tmp_path):
    """The real configuration, vocabulary and FAST+ at a small depth, with random weights."""
    assets = shared / "assets/smolvlm2_256m"
    config = SmolVLMConfig.from_pretrained(assets)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    SmolVLMForConditionalGeneration(config).save_pretrained(tmp_path / "vlm")
    for path in assets.glob("*.json"):
        if path.name != "config.json":
            (tmp_path / "vlm" / path.name).write_bytes(path.read_bytes())
    options = offline_options(shared) | {
        "dataset.repo_id": "lerobot/pusht",
        "policy.type": "smolandfast",
        "policy.push_to_hub": "False",
        "policy.vlm_model_name": tmp_path / "vlm",
        "policy.action_tokenizer": shared / "assets/fast_plus",
        "policy.scale_factor": 2,
        "policy.dtype": "bfloat16",
        "policy.normalization": "quantiles",
        "steps": 4,
        "batch_size": 2,
        "log_freq": 1,
        "output_dir": tmp_path / "run",
    }
    found = losses(run("lerobot-train", options))
    assert len(found) == 4 and found[4] < found[1]
    policy = SMOLANDFASTPolicy.from_pretrained(tmp_path / "run/checkpoints/last/pretrained_model")
    assert policy.model.config.vision_config.image_size == 512 and policy.processor.scale_factor == 2
    observation = {"observation.image": torch.rand(1, 3, 96, 96), "observation.state": torch.full((1, 2), 200.0)}
    chunk = policy.predict_action_chunk(observation)
    assert chunk.shape == (1, 10, 2) and chunk.isfinite().all()
