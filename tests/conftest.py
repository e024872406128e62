"""Builders the tests share: a tiny policy with random weights, and the real artefacts where they are at hand."""

import contextlib
import logging
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from smolandfast import (
    FastActionTokenizer,
    Normalizer,
    SmolAndFastForActionPrediction,
    compute_statistics,
    match_joints,
)
from smolandfast.training import make_tiny_model, make_tiny_processor
from smolandfast.training.tiny import TEXT, VISION

SHARED = Path(__file__).parents[2] / "shared"
TASK = "Push the T-shaped block onto the T-shaped target."
# The code that every checkpoint carries.
PYTHON_FILES = {
    "checks_smolandfast.py",
    "configuration_smolandfast.py",
    "files_smolandfast.py",
    "generation_smolandfast.py",
    "modeling_smolandfast.py",
    "normalization_smolandfast.py",
    "processing_smolandfast.py",
    "prompt_smolandfast.py",
    "grammar_smolandfast.py",
    "tokenization_fast_action.py",
}
# What its action tokenizer's own folder carries.
TOKENIZER_FILES = {
    "checks_smolandfast.py",
    "files_smolandfast.py",
    "grammar_smolandfast.py",
    "tokenization_fast_action.py",
}
CHUNK_SIZE = 8

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, for tests of Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
torch.set_num_threads(1 if PARALLEL else 2)
if PARALLEL:  # for the programs that the tests start
    os.environ["OMP_NUM_THREADS"] = "1"


@contextlib.contextmanager
def warnings_of(module: ModuleType) -> Iterator[list[str]]:
    """What a module of the package warns of, through Transformers' logging."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    module.logger.addHandler(handler)
    try:
        yield messages
    finally:
        module.logger.removeHandler(handler)


@pytest.fixture(scope="session")
def smolvlm_assets() -> Path:
    """SmolVLM2-256M's configuration and tokenizer files, without weights."""
    if not (SHARED / "assets/smolvlm2_256m").is_dir():
        pytest.skip("SmolVLM2's files are not at hand: they are not part of the repository")
    return SHARED / "assets/smolvlm2_256m"


@pytest.fixture(scope="session")
def vlm(smolvlm_assets, tmp_path_factory) -> Path:
    """SmolVLM2's image size and vocabulary in a narrow model of one layer, with random weights."""
    config, folder = SmolVLMConfig.from_pretrained(smolvlm_assets), tmp_path_factory.mktemp("vlm")
    narrow(config, num_layers=1)
    SmolVLMForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    for path in smolvlm_assets.glob("*.json"):
        if path.name != "config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def fast_plus() -> FastActionTokenizer:
    if not (SHARED / "assets/fast_plus").is_dir():
        pytest.skip("the official FAST+ files are not at hand: they are not part of the repository")
    return FastActionTokenizer.from_pretrained(SHARED / "assets/fast_plus")


@pytest.fixture(scope="session")
def pusht_root(tmp_path_factory) -> Iterator[Path]:
    """The PushT demonstrations; their images are decoded once for all tests, into 700 MB."""
    if not (SHARED / "data/pusht").is_dir():
        pytest.skip("the PushT demonstrations are not at hand: they are not part of the repository")
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str((base.parent if PARALLEL else base) / "cache"))
        yield SHARED / "data/pusht"


@pytest.fixture(scope="session")
def demonstrations() -> tuple[np.ndarray, np.ndarray]:
    """Smooth made-up motions in PushT's units: states `(64, 2)` and the chunks that follow `(64, 8, 2)`."""
    rng = np.random.default_rng(0)
    states = rng.uniform(100, 400, (64, 2)).astype(np.float32)
    steps = np.cumsum(rng.normal(0, 8, (64, CHUNK_SIZE, 2)) + rng.normal(0, 5, (64, 1, 2)), axis=1)
    return states, (states[:, None] + steps).astype(np.float32)


def make_processor(demonstrations, **kwargs):
    states, chunks = demonstrations
    names = (kwargs.get(name) for name in ("state_names", "action_names"))
    exclude, is_relative = kwargs.get("relative_exclude_joints", ()), kwargs.get("use_relative_actions", False)
    dims = match_joints(*names, exclude) if exclude and kwargs.get("action_names") else None
    statistics = compute_statistics(states, chunks, dims)
    normalizer = Normalizer(statistics, kwargs.get("normalization", "min_max"), 256, is_relative, dims)
    normalized = normalizer.normalize_actions(chunks, normalizer.state_bins(states))
    tokenizer = FastActionTokenizer.fit(normalized, 10.0, 128, normalizer.action_scale)
    return make_tiny_processor(tokenizer, statistics, TASK, **kwargs)


@pytest.fixture(scope="session")
def processor(demonstrations):
    return make_processor(demonstrations, use_relative_actions=True)


NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}


def narrow(config, num_layers):
    """Make both towers of a configuration narrow and shallow."""
    for name, value in (NARROW | {"num_hidden_layers": num_layers}).items():
        setattr(config.text_config, name, value)
        setattr(config.vision_config, name, value)
    config.text_config.num_key_value_heads, config.text_config.head_dim = 1, 32


def make_small_model(processor, num_layers=2):
    """The tiny model, narrow and with fewer layers in both towers, and random weights."""
    with torch.device("meta"):
        config = make_tiny_model(processor, n_action_steps=4).config
    narrow(config, num_layers)
    torch.manual_seed(0)
    return SmolAndFastForActionPrediction(config).eval()


@pytest.fixture
def model(processor):
    return make_small_model(processor)


@pytest.fixture
def narrow_preset(monkeypatch):
    """Trainings that start from random weights have a narrow model of one layer in each tower."""
    for part in (VISION, TEXT):
        for name, value in (NARROW | {"num_hidden_layers": 1}).items():
            monkeypatch.setitem(part, name, value)


def save_policy(folder: Path, processor) -> Path:
    """A policy of one layer in each tower, which has preferences."""
    model = make_small_model(processor, num_layers=1)
    model.lm_head.weight.data *= 20
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def in_this_process(num_processes, function, items):
    """Replaces `map_in_processes`, as starting a process takes five seconds; what travels to one is pickled here too.

    `test_pusht.py` starts real ones.
    """
    for item in items:
        call = pickle.loads(pickle.dumps((function, item)))
        yield pickle.loads(pickle.dumps(call[0](call[1])))


@pytest.fixture(scope="session")
def saved_policy(demonstrations, tmp_path_factory) -> Path:
    """A folder with a small policy of PushT's control rate, images and dimensions."""
    processor = make_processor(demonstrations, use_relative_actions=True, fps=10, state_names=["x", "y"])
    return save_policy(tmp_path_factory.mktemp("checkpoint") / "policy", processor)


@pytest.fixture(scope="session")
def deployed(saved_policy, tmp_path_factory) -> Path:
    """The same policy, exported, which takes seconds."""
    export = pytest.importorskip("smolandfast.deployment.export", reason='needs pip install -e ".[deployment]"')
    folder = tmp_path_factory.mktemp("deployed") / "policy"
    num_equal, difference = export.export_policy(saved_policy, folder)
    assert num_equal == export.NUM_OBSERVATIONS and difference < 1e-5
    return folder


@pytest.fixture(scope="session")
def batch(demonstrations):
    """Keyword arguments of the processor for four samples."""
    states, chunks = demonstrations
    images = np.random.default_rng(1).integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)
    return {"images": list(images), "text": [TASK] * 4, "state": states[:4], "actions": chunks[:4]}
