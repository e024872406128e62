"""`runs/*.sh` run each script once, with options that it has, and continue where they stopped."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from envs.pusht import BENCHMARK as PUSHT
from train_arguments import parse_arguments

ROOT = Path(__file__).parents[1]
# Used as Python: logs its arguments, writes the files that the scripts write, fails at the step to interrupt.
STAND_IN = """#!/usr/bin/env bash
echo "$@" >> "$LOG"
mkdir -p "${@: -1}/checkpoint-1500"
case "${@: -1}" in *"$INTERRUPTED") exit 130 ;; esac
cd "${@: -1}" && mkdir -p meta
touch model.safetensors training_args.bin vision.safetensors metrics.json meta/info.json
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script with a stand-in for Python and returns its commands."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    log = tmp_path / "log"

    def run_script(script="pusht.sh", interrupted="nothing", arguments=None):
        log.write_text("")
        environment = os.environ | {"PYTHON": str(stand_in), "LOG": str(log), "INTERRUPTED": interrupted}
        if arguments is None:
            arguments = (["data"] if script == "pusht.sh" else []) + [str(tmp_path / "run")]
        command = ["bash", str(ROOT / "runs" / script), *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        return result, [shlex.split(line) for line in log.read_text().splitlines()]

    return run_script


@pytest.mark.parametrize("script, num_trainings", [("pusht.sh", 5), ("metaworld.sh", 4), ("so101.sh", 3)])
def test_every_step_runs_once_with_options_that_its_script_has(script, num_trainings, run, tmp_path, monkeypatch):
    monkeypatch.setattr("train_arguments.get_benchmark", lambda name: PUSHT)  # the others may not be installed
    result, commands = run(script)
    assert result.returncode == 0, result.stderr
    assert all((ROOT / command[0]).is_file() for command in commands)
    trainings = [command[1:] for command in commands if command[0] == "examples/train.py"]
    assert len(trainings) == num_trainings
    for options in trainings:
        assert parse_arguments(options, None)[1].output_dir.startswith(str(tmp_path / "run"))
    outputs = {command[-1] for command in commands}
    for command in commands:  # what a step reads, an earlier one wrote
        for word in command[1:-1]:
            if word.startswith(str(tmp_path / "run")):
                assert any(word.startswith(output) for output in outputs), word
    assert run(script)[1] == []


def test_an_interrupted_training_continues(run):
    result, commands = run(interrupted="/words")
    assert result.returncode == 130 and commands[-1][-1].endswith("/words")
    result, commands = run()
    assert result.returncode == 0 and commands[0][-1].endswith("/words")
    assert commands[0][commands[0].index("--resume_from_checkpoint") + 1] == "last"


def test_missing_folders_are_named(run):
    result, commands = run(arguments=["data"])
    assert result.returncode and "Name a folder for what is trained" in result.stderr and commands == []
