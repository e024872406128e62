"""What README and docs say is so: links lead somewhere, snippets run as they stand, commands work."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
VLM = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
ROLLOUTS = Path(__file__).parent / "data/pusht_rollouts"
# What makes the documented commands short; of an option that is given twice, the last counts.
SHORT = {
    "pretrain_vision.py": "--num_scenes 24 --max_steps 2 --batch_size 4",
    "train.py": "--dataset_root data --max_steps 2 --save_steps 2 --eval_steps 2 --warmup_steps 1 "
    "--report_to none --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
    "--per_device_eval_batch_size 4 --held_out_episodes 1 --eval_episodes 1 --bf16 False",
    "evaluate.py": "--episodes 2 --record 1",
    "record_rollouts.py": "--episodes 1 --max_steps 20",
    "my_robot.py": "--dataset data --max_steps 2 --batch_size 4 --num_workers 0",
    "publish.py": "--output_dir repository",  # without it, the test of that script has a hub to push to
    "app/app.py": "--help",
    "serve.py": "--help",
    "export_policy.py": "",
}
# Run by `make demo`, CI, the plugin's tests, test_metaworld.py and test_so101.py, or for a person with an account.
ELSEWHERE = (
    "make ",
    "pip install ",
    "hf auth login",
    "lerobot-",
    "--policy.",
    "python -m lerobot_policy",
    "ACCELERATE",
    "python examples/collect.py",
    "python examples/drive.py",
    *(
        f"python examples/{script} --benchmark {name}"
        for script in ("pretrain_vision.py", "train.py", "evaluate.py")
        for name in ("metaworld", "so101")
    ),
    "source ",
)


def snippets(page: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    return [code for found, code in blocks if found == language]


def commands(page: str) -> list[str]:
    return [line.partition(" #")[0].strip() for block in snippets(page, "") for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_lead_somewhere(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        name, _, anchor = target.partition("#")
        path = folder / name
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_readme_is_short_and_the_hubs_front_page():
    assert len(PAGES["README.md"].encode()) <= 9_000
    data = ModelCard(PAGES["README.md"]).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "robotics", "apache-2.0")
    assert data.datasets == ["lerobot/pusht"] and "robotics" in data.tags


def test_every_file_of_the_policy_is_in_the_table_of_files():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.py"), ROOT / "deployment", ROOT / "training", ROOT / "examples", ROOT / "runs"]:
        assert path.name == "__init__.py" or f"`{path.name}" in table, path.name


def test_your_own_robot_works_as_it_is_written(vlm, tmp_path, monkeypatch):
    """From the demonstrations to a trained folder that acts, then LoRA on the same model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stand_ins = {VLM: str(vlm), "path/to/your/data": str(ROLLOUTS), "max_steps=10_000": "max_steps=2"}
    stand_ins |= {"per_device_train_batch_size=8": "per_device_train_batch_size=1, use_cpu=True, report_to=[]"}
    names, lora = {}, snippets("training.md", "python")[0]
    for code in [*snippets("your_robot.md", "python"), lora]:
        for there, here in stand_ins.items():
            code = code.replace(there, here)
        names["vlm"] = str(vlm)
        exec(compile(code, "docs", "exec"), names)
    assert (tmp_path / "outputs/mine/model.safetensors").is_file()
    assert {p.dtype for p in names["model"].parameters() if p.requires_grad} == {torch.float32}
    sample = names["dataset"][0]
    batch = names["processor"](images=sample["images"], text=sample["text"], state=sample["state"])
    actions = names["processor"].post_process_actions(names["model"].generate(**batch))
    assert actions.shape == (1, 10, 2) and np.isfinite(actions).all()


@pytest.mark.slow
def test_the_deployed_policy_drives_an_arm_as_it_is_written(tmp_path):
    """The folder alone, without this package. The camera is covered, so the guard stops it; without one it drives."""
    pytest.importorskip("smolandfast.deployment.export").export_policy(
        ROOT / "checkpoints/pusht-tiny", tmp_path / "deployed"
    )
    code = "import sys\nsys.modules |= dict.fromkeys(('torch', 'transformers', 'scipy', 'smolandfast'))\n"
    code += "sys.path.insert(0, 'deployed')\n" + snippets("deployment.md", "python")[0]
    short = code.replace("LOWEST = -1.6", "LOWEST = -1e9").replace("max_steps=90", "max_steps=20")
    for script, words in ((code, "Stopped after three such predictions: log-prob"), (short, "20 steps, ")):
        result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(words)


def test_no_python_snippet_is_left_out():
    """Two of them are run elsewhere: the README's ten lines in test_auto_classes, the controller in test_report."""
    counts = {page: len(snippets(page, "python")) for page in PAGES if snippets(page, "python")}
    here = {"deployment.md": 1, "your_robot.md": 4, "training.md": 1}
    assert counts == {"README.md": 1, "safety.md": 1} | here


def test_every_command_is_known_here_or_tested_elsewhere():
    for page in PAGES:
        for command in filter(None, commands(page)):
            known = command.startswith(ELSEWHERE) or command.split()[1].removeprefix("examples/") in SHORT
            assert known, f"{command!r} of {page} is run by no test"
    plugin_tests = (ROOT / "lerobot_policy_smolandfast/tests/test_commands.py").read_text(encoding="utf-8")
    tested = re.search(r"COMMAND = \((.*?)\n\)", plugin_tests, re.DOTALL)[1]
    assert "".join(re.findall(r'"(.*?)"', tested)) in PAGES["lerobot.md"]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_work_one_after_the_other(page, vlm, tmp_path):
    for name in ("examples", "checkpoints", "assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").symlink_to(ROLLOUTS)
    if page == "publishing.md":
        assert commands(page)[0].startswith("python examples/evaluate.py")
    for number, command in enumerate(commands(page)):
        words = shlex.split(command)
        if command.startswith(ELSEWHERE) or words[:1] != ["python"]:
            continue
        short = SHORT[words[1].removeprefix("examples/")].replace("repository", f"repository{number}").split()
        if "256M" in words:
            short += ["--vlm", str(vlm)]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            [sys.executable, *words[1:], *short], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{command}\n{result.stderr[-3000:]}"
