"""The policy that ships with the repository."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from envs.pusht import BENCHMARK as PUSHT
from evaluate import main as evaluate
from export_checkpoint import export
from export_checkpoint import main as export_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

from smolandfast.files_smolandfast import SUMS, check_checksums, read_checksums

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints/pusht-tiny"


def test_it_is_small_and_in_bf16():
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 20e6
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
        assert {tensor.get_dtype() for tensor in tensors} == {"BF16"}
        assert sum(np.prod(tensor.get_shape()) for tensor in tensors) <= 10e6


def test_shipped_checkpoints_are_weights_and_json():
    """The code is at the repository's root, where `trust_remote_code` finds it with `subfolder`."""
    names = {path.name for path in (ROOT / "checkpoints").rglob("*") if path.is_file()}
    data = {"SHA256SUMS", "chat_template.jinja", "model.safetensors"}
    assert names >= data and {name.rpartition(".")[2] for name in names - data} == {"json"}


def test_evaluation_writes_metrics_video_and_images(tmp_path, monkeypatch):
    monkeypatch.setattr("envs.pusht.BENCHMARK", dataclasses.replace(PUSHT, max_steps=40))
    options = "--episodes 2 --seed 7 --record 1"
    evaluate([*options.split(), "--checkpoint", str(CHECKPOINT), "--output_dir", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["n_episodes"] == 2 and metrics["seed"] == 7 and len(metrics["max_rewards"]) == 2
    assert (tmp_path / "rollouts.mp4").stat().st_size > 1000
    assert (tmp_path / "rollouts.png").stat().st_size > 1000


def test_several_checkpoints_become_their_mean(processor, model, tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    weights = []
    for folder in folders:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    export([str(folder) for folder in folders], tmp_path / "mean")
    found = load_file(tmp_path / "mean/model.safetensors")
    for name, tensor in found.items():
        assert torch.equal(tensor, ((weights[0][name] + weights[1][name]) / 2).bfloat16())
    assert not list((tmp_path / "mean").rglob("*.py"))


def test_an_export_replaces_an_earlier_one_and_nothing_else(processor, model, tmp_path, capsys):
    """A training's folder, with its checkpoints, stays; so does anything that was put next to an export."""
    training, exported = tmp_path / "training", tmp_path / "exported"
    model.save_pretrained(training)
    processor.save_pretrained(training)
    (training / "checkpoint-500").mkdir()
    (training / "checkpoint-500/optimizer.pt").write_text("hours")
    before = sorted(training.rglob("*"))

    def stops(folder):
        with pytest.raises(SystemExit) as stop:
            export_checkpoint(["--checkpoint", str(training), "--output_dir", str(folder)])
        return stop.value.code == 2 and capsys.readouterr().err.strip().splitlines()[-1]

    for _ in range(2):
        export_checkpoint(["--checkpoint", str(training), "--output_dir", str(exported)])
    check_checksums(exported)
    written = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert set(read_checksums(exported / SUMS)) == written - {SUMS}
    assert "error: " in stops(training) and sorted(training.rglob("*")) == before
    for name in ("notes.txt", "notes.json", "checkpoint-1/optimizer.pt"):
        (exported / name).parent.mkdir(exist_ok=True)
        (exported / name).write_text("precious")
        assert name in stops(exported) and (exported / name).read_text() == "precious"
        (exported / name).unlink()
    training.rename(tmp_path / "moved")
    assert str(training) in stops(tmp_path / "new") and not (tmp_path / "new").exists()
