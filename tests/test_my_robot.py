"""From recordings to a policy: the look at the data, and `examples/my_robot.py` on data of an arm."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import export_policy
import my_robot
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SHARED
from lerobot_writer import write_dataset
from PIL import Image
from test_auto_classes import run_outside
from test_data import edit_table

from smolandfast import SmolAndFastForActionPrediction, SmolAndFastProcessor
from smolandfast.deployment import DeployedPolicy
from smolandfast.training import (
    LeRobotChunkDataset,
    action_kind,
    evenly_spaced,
    inspect_dataset,
    tiny,
)
from smolandfast.training.held_out import predict_chunks, split_episodes

FPS, JOINTS, SIZE = 10, ["pan.pos", "lift.pos", "gripper.pos"], 64
EXAMPLES = Path(my_robot.__file__).parent
SO101 = SHARED / "data/so101"


def episode(number: int, kind: str = "targets", length: int = 30) -> dict:
    """An arm of two joints and a gripper moves to a place that the image shows as a bright spot."""
    rng = np.random.default_rng(number)
    goal, time = rng.uniform(-60, 60, 2), np.linspace(0, 1, length + 1)
    path = np.stack([goal[0] * time, goal[1] * np.sin(time * 1.5), 50 * (time > 0.7)], axis=1)
    states = path[:-1] + rng.normal(0, 0.05, (length, 3))
    actions = path[1:] if kind == "targets" else np.diff(path, axis=0)
    images = np.full((length, SIZE, SIZE, 3), 30, np.uint8)
    images[:, int(goal[0] / 2 + 32), int(goal[1] / 2 + 32)] = 255
    images[np.arange(length), 0, np.arange(length)] = 200
    end = np.arange(length) == length - 1
    flags = {"next.reward": end.astype(np.float32), "next.done": end, "next.success": end}
    vectors = {"observation.state": states.astype(np.float32), "action": actions.astype(np.float32)}
    return {"observation.image": images, **vectors, **flags, "task": ["Reach.", "Grasp it."][number % 2]}


def write(root: Path, episodes: list[dict], fps: int = FPS) -> Path:
    axes = {"observation.state": JOINTS, "action": JOINTS}
    write_dataset(root, iter(episodes), fps=fps, robot_type="arm", axes=axes, image_size=SIZE)
    return root


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("recording") / "arm", [episode(i) for i in range(12)])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def inspect(root: Path, chunk_size: int = 8, **options):
    return inspect_dataset(LeRobotChunkDataset(root, chunk_size), **options)


def test_the_check_describes_the_recording_and_recommends_options(recording):
    report = inspect(recording)
    text = str(report)
    for words in ("12 episodes", "360 frames", "10 Hz", "6 x 'Reach.'", "observation.image 64x64", "gripper.pos"):
        assert words in text
    assert report.action_kind == "targets of the state"
    options = {"use_relative_actions": True, "relative_exclude_joints": ["gripper"]}
    assert report.action_options == {"normalization": "min_max", **options}
    errors = [float(x) for x in re.findall(r"([\d.]+), \w+\.pos$", text, re.MULTILINE)]
    assert errors == sorted(errors, reverse=True) and len(errors) > 1
    assert f"recommended: scale {report.fast_scale:g}\n" in text
    assert len(report.warnings) == 1 and "2 of 2 tasks have fewer than 20 episodes" in report.warnings[0]


def test_differences_are_recognised_and_not_made_relative_again(tmp_path):
    root = write(tmp_path / "arm", [episode(i, "differences") for i in range(4)])
    report = inspect(root)
    assert (report.action_kind, report.action_options["use_relative_actions"]) == ("differences", False)
    forced = inspect(root, use_relative_actions=True)
    assert any("differences already" in warning for warning in forced.warnings)
    assert action_kind(LeRobotChunkDataset(root, 8)) == "differences"


def short(number: int) -> dict:
    return episode(number, length=30 if number else 5)


def covered(number: int) -> dict:
    return {**episode(number), "observation.image": np.full((30, SIZE, SIZE, 3), 7, np.uint8)}


def spoilt(number: int) -> dict:
    """One frame of sixty has a wild action."""
    made = episode(number)
    made["action"][:1, 1] = 5000 if number == 0 else 0
    return made


def rarely_grasping(number: int) -> dict:
    """The gripper moves in two of 270 frames."""
    made = episode(number)
    made["action"][:, 2] = np.minimum(np.arange(30), 2) * (np.arange(30) < 3) * (number == 0)
    return made


def parked(number: int) -> dict:
    made = episode(number)
    made["action"][:, 2] = made["observation.state"][:, 2] = 1.5
    return made


@pytest.mark.parametrize(
    "make, count, words",
    [
        (short, 2, "1 of 2 episodes are shorter than a chunk of 8.*chunk_size"),
        (covered, 2, "observation.image shows a plain surface"),
        (spoilt, 9, "action lift.pos has outliers.*quantiles"),
        (parked, 3, "action gripper.pos never changes"),
        (rarely_grasping, 9, "action gripper.pos moves in fewer than 2 %.*min_max"),
    ],
)
def test_the_check_warns_in_one_line_that_says_what_to_do(tmp_path, make, count, words):
    report = inspect(write(tmp_path / "arm", [make(i) for i in range(count)]))
    warnings = [warning for warning in report.warnings if re.search(words, warning)]
    assert len(warnings) == 1 and "\n" not in warnings[0] and warnings[0] in str(report), report.warnings


def test_constant_dimensions_are_named(tmp_path):
    lines = str(inspect(write(tmp_path / "arm", [parked(i) for i in range(3)]))).splitlines()
    assert [line.split()[1] for line in lines if line.endswith("constant")] == ["gripper.pos", "gripper.pos"]


def test_missing_instructions_are_found(recording, tmp_path):
    root = shutil.copytree(recording, tmp_path / "copy")
    edit_table(root / "meta/tasks.parquet", task=["", "Grasp it."])
    assert any("6 episodes have no instruction" in warning for warning in inspect(root).warnings)


def test_irregular_timestamps_are_found(recording, tmp_path):
    root = shutil.copytree(recording, tmp_path / "copy")
    times = np.arange(30) / FPS + np.where(np.arange(30) % 3 == 1, 0.3 / FPS, 0)
    edit_table(root / "data/chunk-000/file-000.parquet", timestamp=np.tile(times, 12).astype(np.float32))
    assert any("time steps differ" in warning for warning in inspect(root).warnings)


def run(*argv: object) -> None:
    """The script, with few layers and few predictions."""
    with pytest.MonkeyPatch.context() as patch:
        for sizes in (tiny.VISION, tiny.TEXT):
            patch.setitem(sizes, "num_hidden_layers", 1)
        patch.setattr(my_robot, "NUM_COMPARED", NUM_COMPARED)
        patch.setattr(my_robot, "NUM_PLOTTED", 2)
        my_robot.main(list(map(str, argv)))


NUM_COMPARED = 10
SHORT = ("--max_steps", 2, "--batch_size", 4, "--save_steps", 1, "--num_workers", 0)


@pytest.fixture(scope="module")
def trained(recording, tmp_path_factory) -> tuple[Path, str]:
    """A policy's folder, and what the script printed."""
    folder, printed = tmp_path_factory.mktemp("trained") / "mine", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        run("--dataset", recording, "--output_dir", folder, *SHORT)
    return folder, printed.getvalue()


def test_one_command_makes_a_policy_with_report_and_plot(recording, trained):
    folder, output = trained
    report = json.loads((folder / "report.json").read_text())
    assert report["joints"] == JOINTS
    assert {*report["mean_absolute_error"]} == {"policy", "hold still", "mean chunk"}
    assert all(np.isfinite(values).all() for values in report["mean_absolute_error"].values())
    assert report["options"]["chunk_size"] == 6 and report["options"]["n_action_steps"] == 3
    held_out = report["held_out_episodes"]
    assert len(held_out) == 3 and {episode % 2 for episode in held_out} == {0, 1}  # both tasks
    data = LeRobotChunkDataset(recording, 6, held_out)
    rows = evenly_spaced(len(data), NUM_COMPARED)
    held = np.abs(data.states[rows, None] - data.action_chunks(rows)).mean(axis=(0, 1))
    np.testing.assert_allclose(report["mean_absolute_error"]["hold still"], held, rtol=1e-5)
    with Image.open(folder / "trajectories.png") as plot:
        assert plot.width > 800 and plot.convert("L").getextrema() == (0, 255)
    for words in (f"export_policy.py --checkpoint {folder}", "drive.py --policy=", "--task=Reach."):
        assert words in output
    model = SmolAndFastForActionPrediction.from_pretrained(folder).eval()
    processor = SmolAndFastProcessor.from_pretrained(folder)
    processor.check_model(model)
    assert (processor.relative_exclude_joints, processor.fps) == (["gripper"], FPS)
    assert processor.training_tasks == ["Reach.", "Grasp it."]
    limits = LeRobotChunkDataset(recording, 6).actions  # of all episodes, the held-out ones too
    np.testing.assert_array_equal(processor.normalizer.action_limits[1], limits.max(axis=0))
    chunks = predict_chunks(model, processor, data, rows)
    error = np.abs(chunks - data.action_chunks(rows)).mean(axis=(0, 1))
    np.testing.assert_allclose(report["mean_absolute_error"]["policy"], error, rtol=0.05)


def test_training_resumes_and_never_overwrites(recording, trained, tmp_path, capsys):
    folder = shutil.copytree(trained[0], tmp_path / "mine")
    weights = (folder / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        run("--dataset", recording, "--output_dir", folder, *SHORT)
    assert "is not empty" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == weights
    with pytest.raises(SystemExit):
        run("--dataset", recording, "--output_dir", folder, "--resume", *SHORT, "--max_steps", 1)
    assert "--max_steps is 1, but" in capsys.readouterr().err
    run("--dataset", recording, "--output_dir", folder, "--resume", *SHORT, "--max_steps", 3)
    state = json.loads((folder / "checkpoint-3/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [1, 2, 3]
    assert (folder / "model.safetensors").read_bytes() != weights


def test_auto_classes_load_the_result_without_the_package(trained, tmp_path):
    code = f"""
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained({str(trained[0])!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(trained[0])!r}, trust_remote_code=True)
processor.check_model(model)
print(type(model).__name__)
"""
    assert run_outside(code, tmp_path).endswith("SmolAndFastForActionPrediction\n")


def test_the_256m_preset_starts_from_a_smolvlm(recording, vlm, tmp_path):
    folder, options = tmp_path / "mine", ("--preset", "256M", "--vlm", vlm, "--image_size", 128)
    run("--dataset", recording, "--output_dir", folder, *options, "--gradient_checkpointing", *SHORT, "--max_steps", 1)
    processor = SmolAndFastProcessor.from_pretrained(folder)
    model = SmolAndFastForActionPrediction.from_pretrained(folder)
    processor.check_model(model)
    assert (processor.image_resizer.side, processor.scale_factor, processor.image_seq_len) == (128, 4, 4)


def test_a_resumed_training_keeps_its_options(recording, trained, tmp_path, capsys):
    folder = shutil.copytree(trained[0], tmp_path / "mine")
    with pytest.raises(SystemExit):
        run("--dataset", recording, "--output_dir", folder, "--resume", *SHORT, "--normalization", "quantiles")
    assert "--normalization min_max (now quantiles)" in capsys.readouterr().err


@pytest.mark.parametrize("names", [JOINTS, ["gripper.pos"], None], ids=["arm", "gripper alone", "no names"])
def test_the_check_alone_writes_nothing_and_takes_one_episode(tmp_path, names, capsys):
    root = write(tmp_path / "arm", [episode(0)])
    if names != JOINTS:
        info = json.loads((root / "meta/info.json").read_text())
        for name in ("observation.state", "action"):
            dim = len(names or JOINTS)
            info["features"][name] |= {"names": names, "shape": [dim]}
            column = pq.read_table(root / "data/chunk-000/file-000.parquet")[name].to_pylist()
            edit_table(root / "data/chunk-000/file-000.parquet", **{name: [row[:dim] for row in column]})
        (root / "meta/info.json").write_text(json.dumps(info))
    run("--dataset", root, "--output_dir", tmp_path / "mine", "--check_only")
    printed = capsys.readouterr().out
    assert "recommended: scale" in printed
    assert ("WARNING: The dimensions of the action have no names" in printed) == (names is None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arm"]


def test_one_episode_of_each_task_is_trained_on(recording, monkeypatch):
    data = LeRobotChunkDataset(recording, 1, [0, 1, 2, 4], cache_dir=False)  # of two tasks, one has a single episode
    monkeypatch.setattr(data, "text", lambda i: "rare" if data.episode_index[i] == 4 else "common")
    assert split_episodes(data, 2) == ([0, 4], [1, 2])
    with pytest.raises(ValueError, match="held_out_episodes is 3 of 4, expected 1 to 2"):
        split_episodes(data, 3)


def test_episodes_can_be_left_out(recording, tmp_path, capsys):
    root = shutil.copytree(recording, tmp_path / "arm")
    table = root / "data/chunk-000/file-000.parquet"
    actions = pq.read_table(table)["action"].to_pylist()
    actions[30 * 4][1] = float("nan")
    edit_table(table, action=actions)
    with pytest.raises(SystemExit):
        run("--dataset", root, "--check_only")
    assert re.search(r"action is .*nan.* in episode 4, frame 0", capsys.readouterr().err)
    run("--dataset", root, "--check_only", "--exclude_episodes", 4, 0)
    assert "10 episodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, words",
    [
        (["--max_step", 3, "--batches", 4], "--batches"),
        (["--dataset", "no/such/folder"], "--dataset is no/such/folder"),
        (["--held_out_episodes", 11], "held_out_episodes is 11 of 12, expected 1 to 10"),
        (["--exclude_episodes", 12], "exclude_episodes is .12., expected some of 0 to 11, not all"),
        (["--exclude_episodes", *range(12)], "exclude_episodes is .*, expected some of 0 to 11, not all"),
        (["--relative_exclude_joints", "thumb"], "'thumb'.*gripper.pos"),
        (["--chunk_size", 4, "--n_action_steps", 5], "n_action_steps is 5"),
        (["--image_size", 100], "image_size is 100, expected a multiple of 32"),
        (["--fast_scale", "nan"], "fast_scale is nan"),
        (["--seed", -1], "seed is -1"),
        (["--resume"], "--resume: there is no training in --output_dir"),
        (["--max_steps", -3], "max_steps is -3"),
        (["--batch_size", 0], "batch_size is 0"),
        (["--num_workers", -1], "num_workers is -1"),
    ],
)
def test_bad_options_are_refused_by_name(recording, tmp_path, options, words, capsys):
    with pytest.raises(SystemExit) as error:
        run("--dataset", recording, "--output_dir", tmp_path / "mine", *options)
    message = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and re.search(words, message), message
    assert not list((tmp_path / "mine").glob("*"))


@pytest.mark.parametrize(
    "script, package, command",
    [("my_robot", "matplotlib", 'pip install -e ".[robot]"'), ("drive", "draccus", 'pip install "lerobot[feetech]==')],
)
def test_a_missing_package_is_named_with_what_installs_it(script, package, command):
    code = f"import sys; sys.modules['{package}'] = None; sys.path.insert(0, {str(EXAMPLES)!r}); import {script}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert package in result.stderr and command in result.stderr


@pytest.mark.skipif(not SO101.is_dir(), reason="the SO-101 recording is not at hand: it is not part of the repository")
def test_a_real_recording_becomes_a_deployed_policy_with_the_same_chunks(tmp_path):
    folder, options = tmp_path / "mine", ("--resize_with_pad", "--max_steps", 1, "--batch_size", 4, "--num_workers", 1)
    options += ("--held_out_episodes", 1, "--n_action_steps", 16, "--fast_scale", 20)
    run("--dataset", SO101, "--output_dir", folder, *options)
    cached = sum(path.stat().st_blocks * 512 for path in (tmp_path / "cache").rglob("*"))
    assert cached <= 100_000 * 848
    export_policy.main(["--checkpoint", str(folder), "--output_dir", str(tmp_path / "deployed")])
    policy = DeployedPolicy(tmp_path / "deployed")
    processor = SmolAndFastProcessor.from_pretrained(folder)
    model = SmolAndFastForActionPrediction.from_pretrained(folder, dtype=torch.float32).eval()
    sample = LeRobotChunkDataset(SO101, 16)[100]
    assert sample["images"][0].shape == (480, 640, 3)
    observation = {name: sample[name] for name in ("images", "text", "state")}
    expected = processor.post_process_actions(model.generate(**processor(**observation)))
    np.testing.assert_array_equal(policy.predict(**observation), expected)
