"""Publishing, with the real hub client against a stand-in of the hub on the loopback interface."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import PYTHON_FILES, TOKENIZER_FILES
from envs.pusht import BENCHMARK as PUSHT
from huggingface_hub import ModelCard, constants
from model_card import read_metrics, read_trainer_state
from PIL import Image
from publish import find_training
from publish import main as push
from stand_in_hub import TOKEN, StandInHub
from train import PolicyTrainer
from train import main as train
from transformers import TrainingArguments
from transformers.utils import hf_api

from smolandfast.files_smolandfast import SUMS, check_checksums, find_file, read_checksums

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints/pusht-tiny"
SHAPE = str((1, json.loads((CHECKPOINT / "config.json").read_text())["chunk_size"], 2))  # of one predicted chunk
RECORDED = Path(__file__).parent / "data/pusht_rollouts"
MODEL = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}
MODEL |= {"tokenizer_config.json", "chat_template.jinja", "action_tokenizer/tokenizer.json", "README.md", "SHA256SUMS"}
METRICS = {
    "checkpoint": "/home/nobody/outputs/tiny",
    "num_envs": 4,
    "dtype": "float32",
    "device": "cpu",
    "n_action_steps": 8,
    "num_threads": 1,
    "do_sample": False,
    "versions": {"torch": "2.99"},
    "avg_max_reward": 0.5,
    "avg_max_reward_low": 0.25,
    "avg_max_reward_high": 0.75,
    "avg_sum_reward": 81.0,
    "pc_success": 25.0,
    "pc_success_low": 4.5,
    "pc_success_high": 69.9,
    "n_episodes": 4,
    "seed": 70,
    "ms_per_chunk": 12.5,
    "max_rewards": [1.0, 0.5, 0.25, 0.25],
    "successes": [True, False, False, False],
}
STATE = {
    "global_step": 40,
    "best_global_step": 20,
    "epoch": 1.5,
    "train_batch_size": 16,
    "log_history": [
        {"step": 20, "loss": 3.25},
        {"step": 20, "eval_loss": 3.5},
        {"step": 20, "eval_avg_max_reward": 0.4, "eval_pc_success": 5.0},
        {"step": 40, "loss": 2.125},
        {"step": 40, "eval_loss": 3.0, "eval_avg_max_reward": 0.3, "eval_pc_success": 0.0},
    ],
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, and a client in this process that knows no other hub."""
    hub = StandInHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api(), "endpoint", hub.endpoint)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between retries
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    return ["--checkpoint", str(CHECKPOINT), "--repo_id", "user/pusht", "--metrics", str(tmp_path / "metrics.json")]


def load_elsewhere(hub: StandInHub, code: str, folder: Path) -> str:
    """Run code in a fresh process that has Transformers and the stand-in, and not this project."""
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    code = "import sys; sys.modules['smolandfast'] = None\n" + code
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def check_hub_checksums(files: dict[str, bytes], folder: Path) -> None:
    """Compare the weights on the hub with the `SHA256SUMS` there."""
    folder.mkdir(exist_ok=True)
    weights = {name for name in files if name.endswith(".safetensors")}
    for name in weights | {SUMS}:
        (folder / name).write_bytes(files[name])
    assert read_checksums(folder / SUMS).keys() == weights
    check_checksums(folder)


def test_what_arrives_on_the_hub_is_the_checkpoint_with_its_code_and_card(hub, arguments, capsys):
    push(arguments)
    files = hub.repos["user/pusht"]
    assert set(files) == PYTHON_FILES | MODEL | {
        "LICENSE",
        "evaluation.json",
        "observation.png",
        "action_tokenizer/tokenizer_config.json",
        *(f"action_tokenizer/{name}" for name in TOKENIZER_FILES),
    }
    assert len(hub.commits) == 1
    for name in MODEL - {"README.md"}:
        assert files[name] == (CHECKPOINT / name).read_bytes()
    for name in PYTHON_FILES:
        assert files[name] == (ROOT / name).read_bytes()
    out = capsys.readouterr().out
    assert "Published: " in out and "--trainer_state" in out and "--contact_sheet" in out


def test_the_ten_lines_of_a_card_and_of_the_readme_load_from_the_hub(hub, arguments, tmp_path):
    """The README's repository has the code at its root, weights and JSON in a folder."""
    push(arguments)
    card = re.search(r"```python\n(.*?)```", hub.repos["user/pusht"]["README.md"].decode(), re.S)[1]
    assert len(card.strip().splitlines()) <= 10
    card += "\nprint(actions.shape, model.config.model_type, repo_id)\n"
    files = [*ROOT.glob("*.py"), *CHECKPOINT.rglob("*")]
    hub.repos["user/smolandfast"] = {
        path.relative_to(ROOT).as_posix(): path.read_bytes() for path in files if path.is_file()
    }
    code = re.search(r"```python\n(from transformers.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    code = code.replace('policy = "."', 'policy = "user/smolandfast"').replace('"assets', f'"{ROOT}/assets')
    printed = load_elsewhere(hub, card + code, tmp_path).splitlines()
    assert printed == [f"{SHAPE} smolandfast user/pusht", SHAPE]
    for repo in ("user/pusht", "user/smolandfast"):
        requests = [request for request in hub.requests if request.startswith(f"GET /{repo}/resolve/")]
        assert any(request.endswith("/modeling_smolandfast.py") for request in requests)


def test_the_card_says_what_was_measured_and_the_hub_takes_it(hub, arguments, tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE))
    Image.new("RGB", (8, 8)).save(tmp_path / "rollouts.png")  # beside the metrics, as evaluate.py has it
    push([*arguments, "--trainer_state", str(tmp_path / "trainer_state.json"), "--datasets", "lerobot/pusht"])
    files = hub.repos["user/pusht"]
    assert "POST /api/validate-yaml" in hub.requests  # of the card, before the commit
    card = ModelCard(files["README.md"].decode())
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "robotics", "apache-2.0")
    assert data.datasets == ["lerobot/pusht"] and data.get("base_model") is None and "pusht" in data.tags
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        name: METRICS[name] for name in ("pc_success", "avg_max_reward", "avg_sum_reward")
    }
    assert results["pc_success"].metric_args == {
        "n_episodes": 4,
        "first_seed": 70,
        "last_seed": 73,
        "n_action_steps": 8,
        "interval_95": [4.5, 69.9],
    }
    text = card.text
    assert "| 25.0 % | 4.5 to 69.9 |" in text and "seeds 70 to 73" in text and "torch 2.99" in text
    assert "weights are those of step 20" in text and "| 40 | 2.125 | 3.000 | 0.300 | 0 % |" in text
    assert "no base model" in text and "nobody" not in text + files["evaluation.json"].decode()
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert files[name].startswith(b"\x89PNG")
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", text)) == {"rollouts.png", "training_curve.png"}


def test_a_file_is_found_on_the_hub_in_the_cache_or_nowhere(hub, tmp_path):
    hub.repos["user/policy"] = {"config.json": b"{}", "parts/tokenizer.json": b"[]"}
    find = partial(find_file, cache_dir=tmp_path)
    cached = partial(find, local_files_only=True)
    assert find("user/policy", "config.json").read_bytes() == b"{}"
    assert find("user/policy", "tokenizer.json", subfolder="parts").read_bytes() == b"[]"
    assert find("user/policy", "SHA256SUMS") is None
    with pytest.raises(OSError, match="user/another is not a local folder"):
        find("user/another", "config.json")
    with pytest.raises(OSError, match="neither a folder nor a Hub id"):
        find("no/such/folder", "config.json")
    assert cached("user/policy", "config.json").read_bytes() == b"{}"
    assert cached("user/policy", "model.safetensors") is None
    assert cached("user/new", "config.json") is None


def test_without_a_network_a_subfolder_is_a_checkpoint_like_any_other(hub, tmp_path):
    """Its optional files are missing, not unreachable: a cached policy in a subfolder loads offline."""
    hub.repos["user/policies"] = {"config.json": b"{}", "small/tokenizer_config.json": b"{}", "bare/a.json": b"{}"}
    find = partial(find_file, "user/policies", cache_dir=tmp_path)
    offline = partial(find, local_files_only=True)
    assert find("config.json")
    assert find("tokenizer_config.json", subfolder="small") and find("SHA256SUMS", subfolder="bare") is None
    assert offline("tokenizer_config.json", subfolder="small").is_file()
    assert offline("SHA256SUMS", subfolder="small") is None
    assert offline("SHA256SUMS", subfolder="bare") is None


@pytest.mark.parametrize("breaks", ["PUT /lfs/", "/lfs/objects/batch", "/commit/"], ids=["weights", "batch", "commit"])
def test_a_broken_connection_changes_nothing_and_a_retry_completes(hub, arguments, breaks, capsys):
    hub.repos["user/pusht"] = before = {
        "README.md": b"older",
        "model-00001-of-00002.safetensors": b"older weights",
        "notes.png": b"somebody's own",
        "last-checkpoint/model.safetensors": b"somebody's own",
        "model_int8/decoder.safetensors": b"somebody's own",
    }
    hub.breaks = breaks
    with pytest.raises(SystemExit):
        push(arguments)
    error = capsys.readouterr().err
    assert "user/pusht failed" in error and "Run the same command again" in error
    assert hub.repos["user/pusht"] is before and hub.commits == []
    sent = len(hub.uploads)
    hub.breaks = None
    hub.requests.clear()
    push(arguments)
    assert len([request for request in hub.requests if request.startswith("PUT")]) == 1 - sent
    files = hub.repos["user/pusht"]
    assert set(files) >= PYTHON_FILES | MODEL and len(hub.commits) == 1
    assert "model-00001-of-00002.safetensors" not in files  # else it might be read in place of the new weights
    assert "notes.png" in files and "last-checkpoint/model.safetensors" in files
    assert "model_int8/decoder.safetensors" in files


def test_pushing_what_is_there_already_changes_nothing(hub, arguments, capsys):
    push(arguments)
    push(arguments)
    assert len(hub.commits) == 1 and capsys.readouterr().out.count("Published: ") == 2


def test_the_training_is_found_where_trainer_leaves_it(tmp_path):
    assert find_training(tmp_path, None) == (None, None)
    for step in (20, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps(STATE | {"global_step": step}))
    assert find_training(tmp_path, None) == (STATE, 20)  # the weights that played best
    assert find_training(tmp_path / "checkpoint-40", None) == (STATE, 40)
    assert find_training(CHECKPOINT, tmp_path / "checkpoint-40/trainer_state.json") == (STATE, 20)


def test_no_right_to_write_says_how_to_log_in(hub, arguments, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SystemExit):
        push(arguments)
    assert "hf auth login" in capsys.readouterr().err and hub.commits == []


def test_a_hub_that_cannot_be_reached_is_an_error_line(hub, arguments, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit):
        push(arguments)
    assert "Run the same command again" in capsys.readouterr().err.splitlines()[-1]


def test_the_repository_can_be_looked_at_before(hub, arguments, tmp_path, capsys):
    push([*arguments, "--output_dir", str(tmp_path / "repository"), "--base_model", "org/vlm"])
    written = tmp_path / "repository"
    assert {path.relative_to(written).as_posix() for path in written.rglob("*")} >= PYTHON_FILES | MODEL
    assert not any(path.is_symlink() for path in written.rglob("*"))
    card = ModelCard.load(written / "README.md")
    assert card.data.base_model == "org/vlm" and "Fine-tuned from [org/vlm]" in card.text
    assert not any(request.startswith(("POST", "PUT")) for request in hub.requests)
    with pytest.raises(SystemExit):
        push([*arguments, "--output_dir", str(written)])
    assert "Name another folder" in capsys.readouterr().err


def test_the_card_of_many_tasks_says_what_each_group_of_them_reached(tmp_path):
    pytest.importorskip("envs.metaworld", exc_type=ImportError)  # also without OSMesa
    metrics = ROOT / "benchmarks/results/metaworld_tiny_500_episodes.json"
    written, checkpoint = tmp_path / "repository", ROOT / "checkpoints/metaworld-tiny"
    arguments = ["--benchmark", "metaworld", "--checkpoint", checkpoint, "--repo_id", "user/many"]
    push([str(part) for part in [*arguments, "--metrics", metrics, "--output_dir", written]])
    card = ModelCard.load(written / "README.md")
    assert "metaworld" in card.data.tags and card.data.get("datasets") is None
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results.keys() == {"pc_success", "mean_over_tasks", "mean_over_groups", "avg_sum_reward"}
    assert results["mean_over_groups"].metric_args["last_seed"] == 1049
    measured = json.loads(metrics.read_text())
    for group, rate in measured["by_group"].items():
        assert f"| success, {group.replace('_', ' ')} | {rate['pc_success']:.1f} % |" in card.text
    assert f"| **mean over these groups** | {measured['mean_over_groups']:.1f} % |" in card.text
    assert "500 episodes of 50 tasks, each with the seeds 1040 to 1049" in card.text and "yu2019" in card.text
    assert "highest reward" not in card.text and "PushT" not in card.text
    assert Image.open(written / "observation.png").size == (128, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pc_success": None}, "pc_success in .* is None, expected a finite number"),
        ({"n_episodes": True}, "n_episodes in .* is True"),
        ({"avg_sum_reward": float("nan")}, "finite"),
        ({"avg_max_reward": 0.9}, "avg_max_reward in .* is 0.9, expected 0.5 by its max_rewards"),
        ({"max_rewards": [0.5]}, r"max_rewards in .* has shape \(1,\), expected \(4\)"),
        ({"max_rewards": [0.5, "a", None, 0.5]}, "max_rewards"),
        ({"pc_success": 75.0}, "pc_success in .* is 75.0, expected 25.0 by its successes"),
        ({"successes": [True]}, r"successes in .* has shape \(1,\), expected \(4\)"),
        ({"successes": [True, "a", None, 1]}, "successes in .* is not an array of numbers"),
        ({"avg_max_reward": "high"}, "avg_max_reward in .* is 'high'"),
        ({"benchmark": "metaworld"}, "is of 'metaworld', expected 'pusht'. Give its --benchmark"),
    ],
)
def test_metrics_that_cannot_be_right_are_refused(tmp_path, change, message):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS | change))
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path / "metrics.json", PUSHT)


def test_the_shipped_metrics_are_readable():
    for path in (ROOT / "benchmarks/results").glob("pusht_*.json"):
        assert read_metrics(path, PUSHT)["n_episodes"] > 0


@pytest.mark.parametrize("content", ["", "[]", '{"log_history": []}', '{"log_history": 3}', '{"log_history": [1]}'])
def test_a_file_that_is_no_trainer_state_is_refused(tmp_path, content):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match="trainer_state.json of the training"):
        read_trainer_state(tmp_path / "trainer_state.json")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--repo_id", "pusht"], "expected user/name"),
        (["--repo_id", "user/a/b"], "expected user/name"),
        (["--metrics", "missing.json"], "missing.json cannot be read"),
        (["--contact_sheet", "missing.png"], "missing.png is not an image"),
        (["--contact_sheet", __file__], "is not an image"),
        (["--trainer_state", "missing.json"], "missing.json cannot be read"),
        (["--checkpoint", "missing"], "not a folder"),
    ],
)
def test_a_wrong_argument_is_an_error_line(arguments, wrong, message, capsys):
    with pytest.raises(SystemExit):
        push([*arguments, *wrong])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_that_does_not_load_is_not_published(hub, arguments, tmp_path, capsys):
    shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    (tmp_path / "checkpoint/action_tokenizer/tokenizer.json").unlink()
    with pytest.raises(SystemExit):
        push([*arguments, "--checkpoint", str(tmp_path / "checkpoint")])
    assert "tokenizer" in capsys.readouterr().err
    assert hub.repos == {}


def test_trainers_push_may_break_and_completes_later(hub, processor, model, tmp_path):
    trainer = PolicyTrainer(
        model,
        TrainingArguments(str(tmp_path), push_to_hub=True, hub_model_id="user/own", report_to="none", use_cpu=True),
        processing_class=processor,
        benchmark=PUSHT,
        eval_tasks=None,
        eval_seeds=range(1),
        card_options={"datasets": ["user/demonstrations"], "base_model": "org/vlm"},
    )
    hub.breaks = "PUT /lfs/"
    with pytest.raises(OSError, match="saved in .* upload to user/own failed.*hf upload user/own"):
        trainer.push_to_hub()
    assert hub.repos["user/own"] == {}
    hub.breaks = None
    trainer.push_to_hub()
    files = hub.repos["user/own"]
    assert set(files) >= PYTHON_FILES | MODEL
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "org/vlm" and card.data.datasets == ["user/demonstrations"]
    assert "Not yet evaluated" in card.text and "log is not part" in card.text


def test_saving_straight_to_the_hub_takes_the_checksums_along(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="user/saved")
    model.push_to_hub("user/pushed")
    for repo in ("user/saved", "user/pushed"):
        check_hub_checksums(hub.repos[repo], tmp_path / "downloaded")


@pytest.mark.slow
def test_trainer_pushes_a_whole_repository_also_in_the_midst_of_training(hub, tmp_path):
    options = {
        "preset": "tiny",
        "dataset_root": RECORDED,
        "output_dir": tmp_path / "run",
        "push_to_hub": True,
        "hub_model_id": "user/trained",
        "max_steps": 2,
        "save_steps": 1,
        "eval_steps": 2,
        "load_best_model_at_end": False,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "held_out_episodes": 1,
        "eval_episodes": 1,
        "bf16": False,
        "report_to": "none",
    }
    train([str(part) for name, value in options.items() for part in (f"--{name}", value)])
    files = hub.repos["user/trained"]
    assert set(files) >= PYTHON_FILES | MODEL | {"observation.png", "training_curve.png"}
    assert set(hub.commits[0]) >= PYTHON_FILES | MODEL - {"README.md"}  # while training
    assert len({version["model.safetensors"] for version in hub.versions}) > 1
    for version in hub.versions:
        check_hub_checksums(version, tmp_path / "downloaded")
    assert "POST /api/validate-yaml" in hub.requests  # of the card, before the commit
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "robotics" and "Not yet evaluated on separate seeds" in card.text
    assert "2 steps" in card.text and str(tmp_path) not in card.content
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1] + "\nprint(actions.shape)"
    assert load_elsewhere(hub, code, tmp_path).strip() == "(1, 16, 2)"  # a preset's
