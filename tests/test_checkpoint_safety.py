"""Checkpoints that were killed, cut short, damaged or meant for another model: a clear error, never a wrong action."""

import contextlib
import functools
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TASK, make_processor, make_small_model
from envs.pusht.scenes import render_scenes
from PIL import Image
from test_data import write_table
from train import EvaluateLastStep
from transformers import AutoModel, TrainerCallback, TrainingArguments

from smolandfast import SmolAndFastForActionPrediction
from smolandfast.files_smolandfast import SUMS, write_checksums
from smolandfast.training import (
    ActionDataCollator,
    AtomicCheckpointTrainer,
    last_whole_checkpoint,
    make_optimizer,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def processor(demonstrations):
    return make_processor(demonstrations)


@pytest.fixture(scope="module")
def policy(processor):
    return make_small_model(processor)


@pytest.fixture
def folder(policy, tmp_path):
    policy.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def shards(policy, tmp_path):
    policy.save_pretrained(tmp_path / "shards", max_shard_size="400KB")
    return tmp_path / "shards"


def flip_a_bit(path, place=0.9):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def load(folder):
    return SmolAndFastForActionPrediction.from_pretrained(folder)


def test_checksums_are_those_that_sha256sum_knows(folder):
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (folder / SUMS).read_text() == f"{expected}  model.safetensors\n"


def test_a_flipped_bit_in_the_weights_is_an_error_that_says_the_mend(folder):
    load(folder)
    flip_a_bit(folder / "model.safetensors")
    with pytest.raises(
        OSError, match=r"model.safetensors is not what was saved: .* Download or save .* delete SHA256"
    ):
        load(folder)
    with pytest.raises(OSError, match="is not what was saved"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)
    (folder / SUMS).unlink()  # as the message says, for weights that were changed on purpose
    load(folder)


def test_every_shard_is_checked(shards, policy):
    names = sorted(path.name for path in shards.glob("model-*.safetensors"))
    assert len(names) > 2
    for name, tensor in load(shards).state_dict().items():
        assert torch.equal(tensor, policy.state_dict()[name])
    flip_a_bit(shards / names[1])
    with pytest.raises(OSError, match=f"{names[1]} is not what was saved"):
        load(shards)
    (shards / names[1]).unlink()
    with pytest.raises(OSError, match=f"lacks {names[1]}, one of its {len(names)} weight files. Download"):
        load(shards)


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"weight_map": {}, "metadata": {}}', '{"weight_map": {"a": "a.safetensors"}}']
    + [f'{{"weight_map": {{"a": "{name}"}}, "metadata": {{}}}}' for name in ("../b.safetensors", "b.bin")],
)
def test_a_damaged_index_is_an_error(shards, index):
    (shards / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="index.json (is|holds) .*Download or save the checkpoint again"):
        load(shards)


@pytest.mark.parametrize("sums", ["", "x", "00  model.safetensors\n", f"{'0' * 64}  ../model.safetensors\n", "\0"])
def test_damaged_checksums_are_an_error(folder, sums):
    (folder / SUMS).write_text(sums)
    with pytest.raises(OSError, match="SHA256SUMS is damaged"):
        load(folder)


def test_weights_that_the_checksums_do_not_list_are_refused(folder):
    (folder / SUMS).write_text(f"{'0' * 64}  model-00001-of-00002.safetensors\n")
    with pytest.raises(OSError, match="SHA256SUMS next to it says nothing"):
        load(folder)


def test_folders_without_checksums_load(folder):
    (folder / SUMS).unlink()
    load(folder)


class WritesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "code ran")


@pytest.mark.parametrize("has_safetensors", [False, True])
def test_pickled_weights_are_never_opened(folder, tmp_path, has_safetensors):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(WritesAFile(tmp_path / "ran")))
    if has_safetensors:
        load(folder)
    else:
        (folder / "model.safetensors").unlink()
        for load_it in (load, lambda path: AutoModel.from_pretrained(path, trust_remote_code=True)):
            with pytest.raises(OSError, match="has no model.safetensors .*Only safetensors files are loaded"):
                load_it(folder)
        with pytest.raises(ValueError, match="use_safetensors=False"):
            SmolAndFastForActionPrediction.from_pretrained(folder, use_safetensors=False)
    assert not (tmp_path / "ran").exists()


def test_sizes_are_compared_before_memory_is_taken(folder):
    """Three terabytes of weights that the file does not have."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has shape \(128, 64\).*|intermediate_size"):
        load(folder)


def test_a_file_in_place_of_the_folder_is_an_error(policy, processor, tmp_path):
    (tmp_path / "taken").write_text("")
    for part in (policy, processor):
        with pytest.raises(OSError, match="taken.*folder"):
            part.save_pretrained(tmp_path / "taken")


def import_again_without_network(modules):
    def refuse(*args, **kwargs):
        raise SystemExit(f"the network was asked for {args}")

    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
    for name in [name for name in sys.modules if name.partition(".")[0] == "smolandfast"]:
        del sys.modules[name]
    for name in modules:
        importlib.import_module(name)


def test_nothing_reaches_the_network_at_import():
    """Every module of the package, in a process whose sockets cannot connect."""
    paths = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("training/*.py")) if path.stem != "__init__"]
    modules = ["smolandfast." + ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    process = multiprocessing.get_context("fork").Process(target=import_again_without_network, args=(modules,))
    process.start()
    process.join()
    assert process.exitcode == 0 and len(modules) > 12


# Training


class Samples(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 4

    def __getitem__(self, i):
        sample = {name: self.batch[name][i] for name in ("text", "state", "actions")}
        return {"images": [self.batch["images"][i]], **sample}


@pytest.fixture(scope="module")
def make_trainer(processor, policy, batch):
    def make(folder, callbacks=(), **options):
        arguments = TrainingArguments(
            str(folder),
            per_device_train_batch_size=2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **{"max_steps": 2, "save_steps": 1} | options,
        )
        return AtomicCheckpointTrainer(
            policy,
            arguments,
            data_collator=ActionDataCollator(processor),
            train_dataset=Samples(batch),
            eval_dataset=Samples(batch),
            processing_class=processor,
            optimizers=(make_optimizer(policy), None),
            callbacks=list(callbacks),
        )

    return make


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(make_trainer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(folder).train()
    return folder


def test_checkpoints_are_whole_and_hold_checksums_of_every_file(trained):
    assert sorted(path.name for path in trained.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    checkpoint = Path(last_whole_checkpoint(trained))
    listed = {line.split("  ")[1] for line in (checkpoint / SUMS).read_text().splitlines()}
    assert listed == {str(p.relative_to(checkpoint)) for p in contents(checkpoint)} - {SUMS}
    assert listed > {"model.safetensors", "optimizer.pt", "trainer_state.json", "action_tokenizer/tokenizer.json"}
    load(checkpoint)


def test_the_last_step_is_evaluated_and_can_be_the_best(make_trainer, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, max_steps=3, learning_rate=1e-3, **options)
    trainer.add_callback(EvaluateLastStep())
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert list(losses) == [2, 3]
    assert trainer.state.best_global_step == min(losses, key=losses.get) == 3
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")


def test_the_best_checkpoint_is_kept_and_remembered(make_trainer, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    make_trainer(tmp_path, max_steps=3, **options).train()
    names = sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]).parent == tmp_path
        assert Path(state["best_model_checkpoint"]).name in names


@pytest.mark.parametrize("damage", ["flipped", "missing", "cut", "no checksums"])
def test_a_damaged_checkpoint_is_passed_over(make_trainer, trained, tmp_path, damage):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    victim = tmp_path / "checkpoint-2" / (SUMS if damage == "no checksums" else "optimizer.pt")
    if damage == "flipped":
        flip_a_bit(victim)
    elif damage == "cut":
        os.truncate(victim, 1000)
    else:
        victim.unlink()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    if damage == "flipped":
        with pytest.raises(OSError, match="optimizer.pt is not what was saved"):
            make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-1" / "rng_state.pth").unlink()
    with pytest.raises(OSError, match="None of the 2 checkpoints"):
        make_trainer(tmp_path).train(resume_from_checkpoint="last")


def test_without_any_checkpoint_training_starts_at_the_beginning(make_trainer, tmp_path):
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-x").mkdir()
    make_trainer(tmp_path, max_steps=1).train(resume_from_checkpoint="last")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-x"]


def test_checkpoints_of_an_earlier_training_are_never_replaced(make_trainer, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(trained, tmp_path / "other")
    before = contents(tmp_path / "run")
    for earlier in (None, False, str(tmp_path / "other/checkpoint-2")):
        with pytest.raises(ValueError, match="output_dir .*run holds checkpoint-2 .*resume_from_checkpoint="):
            make_trainer(tmp_path / "run", save_total_limit=1).train(resume_from_checkpoint=earlier)
    assert contents(tmp_path / "run") == before
    make_trainer(tmp_path / "run", max_steps=3).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert last_whole_checkpoint(tmp_path / "run") == str(tmp_path / "run/checkpoint-3")


def test_label_smoothing_smooths_the_next_tokens_loss(make_trainer, processor, policy, batch, tmp_path):
    inputs = ActionDataCollator(processor)([Samples(batch)[i] for i in range(4)])
    found = {}
    for epsilon in (0.0, 1e-9, 0.25):
        trainer = make_trainer(tmp_path, label_smoothing_factor=epsilon)
        with torch.no_grad():
            count = (inputs["labels"] != -100).sum()
            found[epsilon] = trainer.compute_loss(policy, dict(inputs)).item()
            halved = trainer.compute_loss(policy, dict(inputs), num_items_in_batch=2 * count).item()
            assert halved == pytest.approx(found[epsilon] / 2)  # as with gradient accumulation
    with torch.no_grad():
        full = policy(**{name: tensor for name, tensor in inputs.items() if name != "labels"}).logits[:, :-1]
    scores, targets = full.log_softmax(-1), inputs["labels"][:, 1:]
    uniform = -scores.mean(-1)[targets != -100].mean().item()
    assert found[1e-9] == pytest.approx(found[0.0])
    assert found[0.25] == pytest.approx(0.75 * found[0.0] + 0.25 * uniform)
    with pytest.raises(ValueError, match="label_smoothing_factor is 1.5"):
        make_trainer(tmp_path, label_smoothing_factor=1.5)


def test_training_with_label_smoothing_and_accumulation_has_the_same_losses_without_any(
    make_trainer, policy, tmp_path
):
    weights, losses = {name: tensor.clone() for name, tensor in policy.state_dict().items()}, []
    for epsilon in (0.0, 1e-9):
        options = {"label_smoothing_factor": epsilon, "gradient_accumulation_steps": 2, "eval_strategy": "steps"}
        trainer = make_trainer(tmp_path / str(epsilon), **options, eval_steps=1, save_strategy="no")
        trainer.train()
        policy.load_state_dict(weights)
        losses.append([e.get("loss", e.get("eval_loss")) for e in trainer.state.log_history[:-1]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4


def test_options_by_which_trainer_would_compute_another_loss_are_refused(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="use_liger_kernel is True"):
        make_trainer(tmp_path, use_liger_kernel=True)


@pytest.mark.parametrize("computes_loss", [False, True], ids=["the policy's loss", "compute_loss_func"])
def test_compute_metrics_gets_labels_at_the_positions_of_the_logits(
    make_trainer, processor, policy, batch, tmp_path, computes_loss
):
    def loss_of(outputs, labels, num_items_in_batch=None):
        scores = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(scores, labels[:, 1:].flatten())

    seen = []
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    trainer.compute_metrics = lambda prediction: seen.append(prediction) or {"tokens": 1}
    if computes_loss:
        trainer.compute_loss_func = loss_of
    metrics = trainer.evaluate()
    predictions, labels = seen[0].predictions, seen[0].label_ids
    samples, collate = Samples(batch), ActionDataCollator(processor)
    lengths, nll = set(), []
    for i in range(4):  # one by one
        inputs = collate([samples[i]])
        targets = inputs.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = policy(**inputs).logits[0, :-1]
        is_target = targets != -100
        assert labels[i][labels[i] != -100].tolist() == targets[is_target].tolist()
        expected = logits[is_target].numpy()
        np.testing.assert_allclose(predictions[i][labels[i] != -100], expected, atol=1e-4)
        lengths.add(int(is_target.sum()))
        nll.append(torch.nn.functional.cross_entropy(logits[is_target], targets[is_target], reduction="sum").item())
    assert len(lengths) > 1 and predictions.shape[:2] == labels.shape
    assert metrics["eval_tokens"] == 1
    if not computes_loss:
        per_batch = [sum(nll[i : i + 2]) / (labels[i : i + 2] != -100).sum() for i in (0, 2)]
        assert metrics["eval_loss"] == pytest.approx(np.mean(per_batch), rel=1e-4)


def test_columns_that_only_the_collator_reads_are_kept(make_trainer, processor, batch, tmp_path):
    trainer = make_trainer(tmp_path, remove_unused_columns=True, max_steps=1, save_strategy="no")
    trainer.train()
    assert trainer.args.remove_unused_columns is False
    sample = Samples(batch)[0]
    for name in sample:
        with pytest.raises(ValueError, match=rf"samples\[1\] has no '{name}'.*remove_unused_columns=False"):
            ActionDataCollator(processor)([sample, {k: v for k, v in sample.items() if k != name}])


def die_before_the_checksums(patch, step):
    """End the run at a step, at the last moment at which its checkpoint is not whole yet."""

    def write_or_die(folder, names):
        if folder.name == f"checkpoint-{step}":
            raise KeyboardInterrupt
        write_checksums(folder, names)

    patch.setattr("smolandfast.training.checkpoints.write_checksums", write_or_die)


def test_a_run_killed_in_its_first_save_starts_anew(make_trainer, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        die_before_the_checksums(patch, 1)
        make_trainer(tmp_path).train(resume_from_checkpoint="last")
    assert (tmp_path / "checkpoint-1/trainer_state.json").is_file()
    assert last_whole_checkpoint(tmp_path) is None
    make_trainer(tmp_path, max_steps=1).train(resume_from_checkpoint="last")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_an_older_checkpoint_goes_only_once_the_next_is_whole(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=3, save_total_limit=1)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        die_before_the_checksums(patch, 3)
        trainer.train()
    assert trainer.args.save_total_limit == 1
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-3/rng_state_1.pth").write_text("of a process that the next run does not have")
    make_trainer(tmp_path, max_steps=3, save_total_limit=1).train(resume_from_checkpoint="last")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert last_whole_checkpoint(tmp_path) and not (tmp_path / "checkpoint-3/rng_state_1.pth").exists()


def test_checkpoints_of_a_plain_trainer_are_not_overwritten_unasked(trained, tmp_path):
    shutil.copytree(trained / "checkpoint-1", tmp_path / "checkpoint-1")
    load(tmp_path / "checkpoint-1").save_pretrained(tmp_path / "checkpoint-1")  # checksums of the weights alone
    with pytest.raises(OSError, match="None of the 1 checkpoints"):
        last_whole_checkpoint(tmp_path)


def test_a_model_saved_while_training_is_no_checkpoint(make_trainer, tmp_path):
    class SaveAside(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.save_model(str(tmp_path / "aside"))

    trainer = make_trainer(tmp_path / "run", [SaveAside()], max_steps=1)
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside/notes").write_text("")
    trainer.train()
    load(tmp_path / "aside")
    assert (tmp_path / "aside/notes").is_file()


def test_another_error_while_training_is_let_through(make_trainer, tmp_path):
    class Fail(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="^something else"):
        make_trainer(tmp_path, [Fail()]).train()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint of 4 MB, not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_an_error_and_earlier_checkpoints_stay(make_trainer, small_disk):
    with pytest.raises(OSError, match=r"checkpoint of step 2 cannot be saved in .*disk: .*Make room"):
        make_trainer(small_disk).train()
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint-1"]
    assert last_whole_checkpoint(small_disk) == str(small_disk / "checkpoint-1")


def test_a_disk_that_became_read_only_is_an_error_and_earlier_checkpoints_stay(make_trainer, small_disk):
    make_trainer(small_disk, max_steps=1).train()
    before = contents(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="checkpoint of step 2 cannot be saved in .*disk.*make it writable"):
        make_trainer(small_disk).train(resume_from_checkpoint="last")
    assert contents(small_disk) == before


@pytest.mark.parametrize("room", [0, 16, 48, 64, 80])
@pytest.mark.parametrize("part", ["policy", "processor"])
def test_saving_to_a_full_or_read_only_disk_is_an_os_error(request, part, room, small_disk):
    part = request.getfixturevalue(part)
    with pytest.raises(OSError, match="No space"), open(small_disk / "ballast", "wb", buffering=0) as ballast:
        while True:
            ballast.write(b"\0" * 4096)
    os.truncate(small_disk / "ballast", os.path.getsize(small_disk / "ballast") - room * 1024)
    with pytest.raises(OSError, match=r"cannot be saved in .*policy"):
        part.save_pretrained(small_disk / "policy")
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="cannot be saved in .*elsewhere"):
        part.save_pretrained(small_disk / "elsewhere")


# SIGKILL


@functools.cache
def scene_files(size):
    """60 scenes as a column of PNG files."""
    files = []
    for scene in render_scenes(60, seed=0)[0]:
        Image.fromarray(scene).resize((size, size)).save(png := io.BytesIO(), "PNG")
        files.append({"bytes": png.getvalue(), "path": None})
    return files


def write_demonstrations(root, task=TASK, fps=10, state_dim=2, action_dim=2, size=96, cameras=1):
    """Three episodes of 20 frames in LeRobot's layout, images inside parquet; by default PushT's."""
    rng = np.random.default_rng(0)
    keys = ["observation.image", "observation.wrist"][:cameras]
    lengths, episode = [20, 20, 20], np.repeat(np.arange(3), 20)
    positions = 256 + np.cumsum(rng.normal(0, 5, (60, 2)), axis=0).astype(np.float32)
    targets = positions + rng.normal(0, 5, (60, 2)).astype(np.float32)
    positions, targets = np.tile(positions, 3)[:, :state_dim], np.tile(targets, 3)[:, :action_dim]
    vectors = {"observation.state": list(positions), "action": list(targets)}
    features = {"observation.state": {"shape": [state_dim]}, "action": {"shape": [action_dim]}}
    features |= {key: {"dtype": "image", "shape": [size, size, 3]} for key in keys}
    info = {"codebase_version": "v3.0", "fps": fps, "total_frames": 60, "total_episodes": 3, "features": features}
    rows = {"episode_index": episode, "frame_index": np.tile(np.arange(20), 3), "task_index": np.zeros(60, int)}
    write_table(
        root / "data/chunk-000/file-000.parquet", {**vectors, **dict.fromkeys(keys, scene_files(size)), **rows}
    )
    places = {"data/chunk_index": [0] * 3, "data/file_index": [0] * 3}
    episodes = {"episode_index": [0, 1, 2], "length": lengths, **places}
    write_table(root / "meta/episodes/chunk-000/file-000.parquet", episodes)
    write_table(root / "meta/tasks.parquet", {"task_index": [0], "task": [task]})
    (root / "meta/info.json").write_text(json.dumps(info))
    numbers = {"observation.state": positions, "action": targets}
    stats = {key: {"min": v.min(0).tolist(), "max": v.max(0).tolist()} for key, v in numbers.items()}
    (root / "meta/stats.json").write_text(json.dumps(stats))
    return root


def training_command(dataset, folder, max_steps):
    options = {
        "dataset_root": dataset,
        "output_dir": folder,
        "max_steps": max_steps,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "warmup_steps": 4,
        "eval_strategy": "no",
        "load_best_model_at_end": "False",
        "held_out_episodes": 1,
        "bf16": "False",
        "report_to": "none",
        "log_level": "info",
        "resume_from_checkpoint": "last",
    }
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return [sys.executable, str(ROOT / "examples/train.py"), *arguments]


def losses_and_weights(folder):
    checkpoint = Path(last_whole_checkpoint(folder))
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    losses = [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]
    return losses, (checkpoint / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_checksums_are_written_once_all_processes_have_saved(tmp_path):
    dataset = write_demonstrations(tmp_path / "demonstrations")
    program, *options = training_command(dataset, tmp_path / "run", 4)
    launcher = [program, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for steps in (2, 4):  # the second run resumes
        command = [*launcher, *options, "--max_steps", str(steps)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        checkpoint = tmp_path / f"run/checkpoint-{steps}"
        assert last_whole_checkpoint(tmp_path / "run") == str(checkpoint)
        listed = {line.split("  ")[1] for line in (checkpoint / SUMS).read_text().splitlines()}
        assert listed == {str(path.relative_to(checkpoint)) for path in contents(checkpoint)} - {SUMS}
        assert listed > {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.slow
def test_training_survives_twenty_kills_with_the_losses_of_an_uninterrupted_run(tmp_path):
    """Half of the kills fall anywhere, the others into the writing of a checkpoint."""
    dataset, max_steps = write_demonstrations(tmp_path / "demonstrations"), 300
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    start = time.monotonic()
    subprocess.run(training_command(dataset, tmp_path / "whole", 2), env=environment, check=True, capture_output=True)
    seconds_to_start = time.monotonic() - start
    shutil.rmtree(tmp_path / "whole")
    command = training_command(dataset, tmp_path / "whole", max_steps)
    subprocess.run(command, env=environment, check=True, capture_output=True)

    rng = np.random.default_rng(0)
    folder, during_a_write, resumed_at = tmp_path / "killed", 0, []

    def half_written():
        """The checkpoint with the highest step, if it is neither whole nor left by an earlier kill."""
        newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), default=None)
        with contextlib.suppress(FileNotFoundError):  # written or deleted meanwhile
            if newest is None or (newest / "old").exists() or "trainer_state.json" in (newest / SUMS).read_text():
                return None
        return newest

    for kill in range(21):
        whole = last_whole_checkpoint(folder)
        if left := half_written():
            (left / "old").touch()
        with open(tmp_path / "log", "w") as log:
            life = subprocess.Popen(
                training_command(dataset, folder, max_steps), env=environment, stdout=log, stderr=log
            )
        if kill == 20:
            assert life.wait() == 0
        elif kill % 2:
            writes, seen = rng.integers(1, 5), set()
            while len(seen) < writes:
                assert life.poll() is None, "it came to its end"
                seen |= {half_written()} - {None}
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.2))
        else:
            time.sleep(rng.uniform(0.5, 1.0) * seconds_to_start + rng.uniform(0, 2))
        life.kill()
        life.wait()
        during_a_write += half_written() is not None
        text = r"Resuming training from checkpoint with epoch \d+ and global step (\d+)"
        if found := re.search(text, (tmp_path / "log").read_text()):  # else it was killed before, or just began
            resumed_at.append(int(found[1]))
            assert whole.endswith(f"checkpoint-{found[1]}")
    print(f"20 kills, {during_a_write} of them while a checkpoint was written, resumed at steps {resumed_at}")
    assert during_a_write >= 5 and len(set(resumed_at)) >= 5
    assert losses_and_weights(folder) == losses_and_weights(tmp_path / "whole")
    assert [step for step, *_ in losses_and_weights(folder)[0]] == list(range(1, max_steps + 1))
