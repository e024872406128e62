"""A saved folder is all a user needs: it loads in a fresh process, outside the project, with Transformers alone."""

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from conftest import PYTHON_FILES, make_processor, make_small_model, warnings_of
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
    """What code prints, warnings included, where `import smolandfast` fails, as on a user's machine."""
    blocked = "import sys; sys.modules['smolandfast'] = None\n"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    result = subprocess.run([sys.executable, "-c", blocked + code], cwd=tmp_path, env=environment, **output)
    assert result.returncode == 0, result.stdout
    return result.stdout


IN_A_FRESH_PROCESS = """
import json, pickle
import numpy as np
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
observation = np.load("observation.npz")
for name in ("absolute", "relative"):
    model, model_again = (AutoModel.from_pretrained(name, trust_remote_code=True) for _ in range(2))
    processor, processor_again = (AutoProcessor.from_pretrained(name, trust_remote_code=True) for _ in range(2))
    inputs = processor(images=observation["image"], text="Push the block.", state=observation["state"])
    np.save(f"{name}.npy", processor.post_process_actions(model.generate(**inputs)))
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    assert config.model_type == "smolandfast" and config.chunk_size == 8
    fast = AutoTokenizer.from_pretrained(name, subfolder="action_tokenizer", trust_remote_code=True)
    assert fast.decode_actions(fast.encode_actions(np.zeros((1, 8, 2)))).shape == (1, 8, 2)
    alone = AutoTokenizer.from_pretrained(f"{name}/action_tokenizer", trust_remote_code=True)
    chunks = np.load(f"{name}_chunks.npy")
    again = type(alone).fit(chunks, alone.scale, len(alone))
    with open(f"{name}.json", "w") as file:
        json.dump([tokenizer.encode_actions(chunks) for tokenizer in (fast, alone, again)], file)
    assert "User" in AutoTokenizer.from_pretrained(name).decode(inputs["input_ids"][0])

    assert type(model) is type(model_again) and type(processor) is type(processor_again)
    copied = pickle.loads(pickle.dumps(model))
    assert type(copied) is type(model) and copied.config.to_dict() == model.config.to_dict()
    assert pickle.loads(pickle.dumps(processor)).fingerprint == processor.fingerprint
    print("pickled", name)
"""


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def outside(ten_lines, demonstrations, batch, tmp_path_factory):
    """What two policies predict and encode, and what a fresh process that loads them does, and prints.

    It begins with the README's ten lines, in a folder without the repository, where the release of Transformers was
    tested.
    """
    folder, expected, tokens = tmp_path_factory.mktemp("outside"), {}, {}
    image, state = batch["images"][0], batch["state"][0]
    np.savez(folder / "observation.npz", image=image, state=state)
    for name in ("absolute", "relative"):
        processor = make_processor(demonstrations, use_relative_actions=name == "relative")
        model = make_small_model(processor)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        ids = model.generate(**processor(images=image, text="Push the block.", state=state))
        expected[name] = processor.post_process_actions(ids)
        bins = processor.normalizer.state_bins(demonstrations[0])
        chunks = processor.normalizer.normalize_actions(demonstrations[1], bins)
        tokens[name] = processor.action_tokenizer.encode_actions(chunks)
        np.save(folder / f"{name}_chunks.npy", chunks)
    version = "import transformers\ntransformers.__version__ = '5.24.1'\n"
    printed = run_outside(version + find_repository(ten_lines, str(ROOT)) + IN_A_FRESH_PROCESS, folder)
    predicted = {name: np.load(folder / f"{name}.npy") for name in expected}
    encoded = {name: json.loads((folder / f"{name}.json").read_text()) for name in expected}
    return (expected, predicted), (tokens, encoded), printed


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


def test_auto_classes_predict_the_same_actions_in_a_fresh_process(outside):
    expected, predicted = outside[0]
    for name in ("absolute", "relative"):
        np.testing.assert_allclose(predicted[name], expected[name])


def test_action_tokenizers_encode_and_fit_the_same_in_a_fresh_process(outside):
    """From the policy's folder, from their own folder, and fitted again."""
    tokens, encoded = outside[1]
    for name in ("absolute", "relative"):
        assert encoded[name] == [tokens[name]] * 3


def test_a_release_that_was_not_tested_is_warned_of_once(monkeypatch):
    """By all copies of the code that a process loads."""
    monkeypatch.setattr(transformers, "__version__", "5.25.0.dev0")
    with warnings_of(SimpleNamespace(logger=logging.getLogger("smolandfast"))) as messages:
        for name in ("smolandfast.one", "smolandfast.other"):
            spec = importlib.util.spec_from_file_location(name, ROOT / "configuration_smolandfast.py")
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
    assert ["and this is 5.25.0.dev0" in message for message in messages] == [True]


def test_loading_twice_gives_one_class_and_models_that_can_be_pickled(outside):
    """As `DataLoader` workers, `multiprocessing` and `torch.save` of a whole model need it."""
    printed = outside[-1]
    assert "pickled absolute" in printed and "pickled relative" in printed


def test_the_readmes_ten_lines_work_from_another_folder(ten_lines, outside):
    """Without a warning where the release of Transformers was tested."""
    printed = outside[-1]
    assert re.search(r"print\(actions.shape\)  # (.*)", ten_lines)[1] in printed.splitlines()
    assert "5.24.1" not in printed


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
        result = rollout(PUSHT, predict, [1002, 1005], names["model"].config.n_action_steps)
    assert not messages
    assert np.mean(result.max_rewards) > 0.8  # both are solved, for 1.0; 0.08 is holding still


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
