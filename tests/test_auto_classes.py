"""A saved folder is all a user needs: it loads in a fresh process, outside the project, with Transformers alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PYTHON_FILES, warnings_of
from envs.pusht import BENCHMARK as PUSHT
from rollouts import rollout
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from smolandfast import (
    FastActionTokenizer,
    SmolAndFastConfig,
    SmolAndFastForActionPrediction,
    SmolAndFastProcessor,
)

ROOT = Path(__file__).parents[1]


def run_outside(code: str, tmp_path: Path) -> str:
    """Run code where `import smolandfast` fails, as on a user's machine."""
    blocked = "import sys; sys.modules['smolandfast'] = None\n"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", blocked + code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def folder(processor, model, tmp_path):
    model.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_the_folder_holds_weights_processor_tokenizers_and_code(folder):
    names = {path.name for path in folder.iterdir()}
    assert names >= PYTHON_FILES
    assert {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"} <= names
    assert (folder / "action_tokenizer/tokenizer.json").is_file()


def test_auto_classes_predict_the_same_actions_in_a_fresh_process(folder, processor, model, batch, tmp_path):
    image, state = batch["images"][0], batch["state"][0]
    np.savez(tmp_path / "observation.npz", image=image, state=state)
    expected = processor.post_process_actions(
        model.generate(**processor(images=image, text="Push the block.", state=state))
    )
    run_outside(
        """
import numpy as np
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
observation = np.load("observation.npz")
model = AutoModel.from_pretrained("policy", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("policy", trust_remote_code=True)
inputs = processor(images=observation["image"], text="Push the block.", state=observation["state"])
np.save("actions.npy", processor.post_process_actions(model.generate(**inputs)))
config = AutoConfig.from_pretrained("policy", trust_remote_code=True)
assert config.model_type == "smolandfast" and config.chunk_size == 8
fast = AutoTokenizer.from_pretrained("policy", subfolder="action_tokenizer", trust_remote_code=True)
assert fast.decode_actions(fast.encode_actions(np.zeros((1, 8, 2)))).shape == (1, 8, 2)
assert "User" in AutoTokenizer.from_pretrained("policy").decode(inputs["input_ids"][0])
""",
        tmp_path,
    )
    np.testing.assert_allclose(np.load(tmp_path / "actions.npy"), expected)


@pytest.mark.parametrize("processor", [False], indirect=True, ids=["absolute"])
@pytest.mark.parametrize(("version", "warnings"), [("5.24.1", 0), ("5.25.0.dev0", 1)])
def test_a_release_that_was_not_tested_is_warned_of_once(folder, version, warnings, tmp_path):
    printed = run_outside(
        f"""
import os
os.dup2(1, 2)
from transformers import AutoConfig, AutoModel, AutoProcessor
sys.modules["transformers"].__version__ = {version!r}
for auto_class in (AutoConfig, AutoModel, AutoProcessor):
    auto_class.from_pretrained("policy", trust_remote_code=True)
""",
        tmp_path,
    )
    assert printed.count(f"and this is {version}") == warnings


@pytest.fixture
def ten_lines() -> str:
    """The README's loading example, word for word."""
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(from transformers import AutoModel.*?)```", readme, re.S)[1]
    assert len(code.strip().splitlines()) <= 10
    return code


def find_repository(code: str, repository: str) -> str:
    """The README's lines for a reader who is somewhere else: he writes where the repository is."""
    places = {
        'repo, policy = "."': f"repo, policy = {repository!r}",
        '"assets/pusht.png"': repr(f"{ROOT}/assets/pusht.png"),
    }
    for here, there in places.items():
        assert here in code
        code = code.replace(here, there)
    return code


def test_the_readmes_ten_lines_work_from_an_empty_folder(ten_lines, tmp_path):
    (tmp_path / "empty").mkdir()
    printed = run_outside(find_repository(ten_lines, str(ROOT)), tmp_path / "empty")
    assert printed.strip() == re.search(r"print\(actions.shape\)  # (.*)", ten_lines)[1]


def test_the_readmes_ten_lines_play(ten_lines, monkeypatch):
    """With their own sentence: the one that the README told the policy before was new to it, and it solved nothing."""
    monkeypatch.chdir(ROOT)
    load, act = ten_lines.split("inputs = ")
    for example, name in (('Image.open("assets/pusht.png")', "image"), ("[131.0, 258.0]", "state")):
        assert example in act
        act = act.replace(example, name)
    names = {}
    exec(load, names)
    act = compile(f"inputs = {act}", "README.md", "exec")

    def predict(images, states, texts):
        chunks = []
        for names["image"], names["state"] in zip(images, states, strict=True):
            exec(act, names)
            chunks.append(names["actions"][0])
        return np.stack(chunks)

    with warnings_of(sys.modules[type(names["processor"]).__module__]) as messages:
        result = rollout(PUSHT, predict, range(1000, 1004), names["model"].config.n_action_steps)
    assert not messages
    assert np.mean(result.max_rewards) > 0.8  # 0.08 is holding still


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}])
def test_where_the_package_is_installed_no_code_of_a_checkpoint_runs(folder, processor, options):
    expected = processor.tokenizer.tokenize("State: 1234")
    for path in folder.rglob("*.py"):
        path.write_text("raise SystemExit('code of a checkpoint ran')")
    assert type(AutoConfig.from_pretrained(folder, **options)) is SmolAndFastConfig
    assert type(AutoModel.from_pretrained(folder, **options)) is SmolAndFastForActionPrediction
    assert type(AutoProcessor.from_pretrained(folder, **options)) is SmolAndFastProcessor
    fast = AutoTokenizer.from_pretrained(folder, subfolder="action_tokenizer", **options)
    assert type(fast) is FastActionTokenizer
    text = AutoTokenizer.from_pretrained(folder, **options)
    assert type(text) is PreTrainedTokenizerFast and text.tokenize("State: 1234") == expected


def test_loading_twice_gives_one_class_and_models_that_can_be_pickled(folder, tmp_path):
    """As `DataLoader` workers, `multiprocessing` and `torch.save` of a whole model need it."""
    run_outside(
        """
import pickle
from transformers import AutoModel, AutoProcessor
first, second = (AutoModel.from_pretrained("policy", trust_remote_code=True) for _ in range(2))
assert type(first) is type(second)
copied = pickle.loads(pickle.dumps(first))
assert type(copied) is type(first) and copied.config.to_dict() == first.config.to_dict()
processors = [AutoProcessor.from_pretrained("policy", trust_remote_code=True) for _ in range(2)]
assert type(processors[0]) is type(processors[1])
assert pickle.loads(pickle.dumps(processors[0])).fingerprint == processors[0].fingerprint
""",
        tmp_path,
    )
