"""Any bytes, any time: malformed input ends in a right answer or in an exception.

Never in a hang, a crash, or an action that is not finite or not inside the statistics' limits. Observations and data
sets are refused with a ValueError or OSError that says what is wrong; damaged checkpoints, configurations and ids may
also end in an exception of a library.
`make fuzz` runs many more cases, other ones each time; FUZZ_CASES sets how many a test.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TASK, make_processor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from test_checkpoint_safety import write_demonstrations
from test_data import DATA, EPISODES, FRONT, INFO, WRIST, tiny_source  # noqa: F401

from smolandfast import (
    FastActionTokenizer,
    Normalizer,
    SmolAndFastConfig,
    SmolAndFastForActionPrediction,
    SmolAndFastProcessor,
    compute_statistics,
)
from smolandfast.training import LeRobotChunkDataset, make_tiny_model

CASES = os.environ.get("FUZZ_CASES")
settings.register_profile(
    "fuzz",
    max_examples=int(CASES or 20),
    derandomize=CASES is None,
    database=None,
    deadline=30_000,  # milliseconds a case: no hang
    suppress_health_check=list(HealthCheck),
)
fuzz = settings.get_profile("fuzz")

HUGE = [10**9, -(10**9), 2**31, 2**63, 10**30, 1e30, 1e308, -1e308, float("nan"), float("inf"), -float("inf")]
ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    1.5,
    "",
    "x",
    "0",
    "\ud7ff",
    [],
    {},
    [0],
    [None],
    [[1]],
    ["x"],
    {"a": 1},
    *HUGE,
]
json_junk = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
junk = json_junk | st.binary(max_size=5)
NUMBERS = (np.float64, np.float32, np.float16, np.int64, np.uint8, np.bool_, np.complex64, "U3", "O")
odd_arrays = st.sampled_from(NUMBERS).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
)
mutations = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "drop", "insert"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=3,
)


@contextlib.contextmanager
def refusing(*names):
    """A ValueError or an OSError is a right end, if it names one of `names`."""
    try:
        yield
    except (ValueError, OSError) as error:
        assert not names or any(name in str(error) for name in names), f"{names} not in: {error}"


@contextlib.contextmanager
def failing():
    """Any exception but that of an assertion is a right end."""
    try:
        yield
    except AssertionError:
        raise
    except Exception:
        pass


def mutate_bytes(content: bytes, mutations) -> bytes:
    for kind, place, piece in mutations:
        at = int(place * len(content))
        if kind == "cut":
            content = content[:at]
        elif kind == "drop":
            content = content[:at] + content[at + len(piece) :]
        elif kind == "insert":
            content = content[:at] + piece + content[at:]
        else:
            content = content[:at] + bytes([piece[0]]) + content[at + 1 :]
    return content


def paths_in(tree, path=()):
    """Every place in a JSON tree."""
    yield path
    for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from paths_in(branch, (*path, key))


def replaced(tree, path, value):
    """The tree with another value at one place; `...` takes it out."""
    if not path:
        return value
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(path) == 1 and value is ...:
        del tree[path[0]]
    else:
        tree[path[0]] = replaced(tree[path[0]], path[1:], value)
    return tree


def mutate_json(content: dict, draw) -> tuple[dict, list[str]]:
    """Another value at one place of the tree, and the names on the way there."""
    places = [path for path in paths_in(content) if path]
    # Long lists would otherwise take nearly all of the cases.
    tops = {}
    for path in places:
        tops.setdefault(tuple(p for p in path if isinstance(p, str)), []).append(path)
    path = draw(st.sampled_from(draw(st.sampled_from(sorted(tops.values(), key=str)))))
    return replaced(content, path, draw(json_junk | st.just(...))), [name for name in path if isinstance(name, str)]


@pytest.fixture(scope="module")
def processor(demonstrations):
    return make_processor(demonstrations, use_relative_actions=True)


@pytest.fixture(scope="module")
def observation(batch):
    return {"images": batch["images"][0], "state": batch["state"][0], "text": TASK}


@pytest.fixture(scope="module")
def tokenizer(processor):
    return processor.action_tokenizer


@pytest.fixture(scope="module")
def small_policy(processor):
    """The tiny preset at one layer."""
    config = make_tiny_model(processor, n_action_steps=4).config.to_dict()
    for part in ("vision_config", "text_config"):
        config[part] |= {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config["text_config"] |= {"num_key_value_heads": 1, "head_dim": 8}
    return SmolAndFastForActionPrediction(SmolAndFastConfig.from_dict(config)).eval()


@pytest.fixture(scope="module")
def folder(processor, small_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    small_policy.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "SHA256SUMS").unlink()  # else every change of the weights would end there
    return folder


@contextlib.contextmanager
def changed(path: Path, content: bytes):
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def assert_chunks(actions, processor, count=1):
    low, high = (np.float32(limit) for limit in processor.normalizer.action_limits)
    assert actions.shape == (count, processor.chunk_size, processor.normalizer.action_dim)
    assert np.isfinite(actions).all() and (actions >= low).all() and (actions <= high).all()


# The tokenizer


@fuzz
@given(actions=odd_arrays | junk)
def test_any_chunk_is_encoded_or_refused(tokenizer, actions):
    with refusing("actions"):
        ids = tokenizer.encode_actions(actions)
        assert len(ids) == len(actions) and tokenizer.decode_actions(ids).shape == np.shape(actions)


@fuzz
@given(chunks=arrays(st.sampled_from([np.float32, np.float64]), st.just((3, 8, 2))))
def test_any_numbers_decode_to_finite_chunks(tokenizer, chunks):
    with refusing("actions"):
        assert np.isfinite(tokenizer.decode_actions(tokenizer.encode_actions(chunks))).all()


@fuzz
@given(ids=odd_arrays | junk | st.lists(st.lists(st.integers(-3, 140), max_size=20), max_size=4))
def test_any_ids_are_decoded_or_refused(tokenizer, ids):
    with failing():
        actions = tokenizer.decode_actions(ids)
        assert actions.shape == (len(ids), 8, 2) and np.isfinite(actions).all()


@fuzz
@given(horizon=junk, action_dim=junk)
def test_any_chunk_shape_is_decoded_or_refused(fast_plus, horizon, action_dim):
    with failing():
        fast_plus.decode_actions(fast_plus.encode_actions(np.zeros((1, 4, 2))), horizon, action_dim)


@fuzz
@given(
    chunks=odd_arrays | junk,
    scale=st.just(10.0) | junk,
    vocab_size=st.integers(1, 300) | st.sampled_from([None, "x", True, 1.5, -1]),
)
def test_any_fit_succeeds_or_is_refused(chunks, scale, vocab_size):
    with refusing("chunks", "actions", "scale", "vocab"):
        tokenizer = FastActionTokenizer.fit(chunks, scale, vocab_size)
        assert np.isfinite(np.hstack(list(tokenizer.fit_report.values()))).all()


def use_tokenizer(folder):
    tokenizer = FastActionTokenizer.from_pretrained(folder)
    chunks = np.linspace(-1, 1, 16).reshape(1, 8, 2)
    actions = tokenizer.decode_actions(tokenizer.encode_actions(chunks))
    assert actions.shape == (1, 8, 2) and np.isfinite(actions).all()


@fuzz
@given(name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), mutations=mutations)
def test_any_bytes_as_tokenizer_files(folder, name, mutations):
    path = folder / "action_tokenizer" / name
    with changed(path, mutate_bytes(path.read_bytes(), mutations)), refusing():
        use_tokenizer(path.parent)


@fuzz
@given(name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), data=st.data())
def test_any_fields_in_tokenizer_files(folder, name, data):
    path = folder / "action_tokenizer" / name
    content, _ = mutate_json(json.loads(path.read_text()), data.draw)
    with changed(path, json.dumps(content).encode()), refusing():
        use_tokenizer(path.parent)


# Statistics and the processor


@fuzz
@given(data=st.data())
def test_any_statistics_are_used_or_refused(processor, data):
    statistics, _ = mutate_json(processor.statistics, data.draw)
    with refusing("statistics", "use_relative_actions"):
        normalizer = Normalizer(statistics, "min_max", 256, use_relative_actions=data.draw(st.booleans()))
        bins = normalizer.state_bins(np.zeros((1, normalizer.state_dim)))
        actions = normalizer.unnormalize_actions(np.ones((1, 8, normalizer.action_dim)), bins)
        assert np.isfinite(actions).all()


@fuzz
@given(normalization=junk, n_state_bins=junk, use_relative_actions=junk)
def test_any_option_of_the_normalizer(processor, normalization, n_state_bins, use_relative_actions):
    with refusing("normalization", "n_state_bins", "use_relative_actions"):
        normalizer = Normalizer(processor.statistics, normalization, n_state_bins, use_relative_actions)
        assert np.isfinite(normalizer.state_bins([[0.0, 0.0]])).all()


@fuzz
@given(states=odd_arrays | junk, actions=odd_arrays | junk)
def test_any_demonstrations_are_measured_or_refused(states, actions):
    with refusing("states", "actions"):
        statistics = compute_statistics(states, actions)
        assert all(np.isfinite(list(numbers.values())).all() for numbers in statistics.values())


odd_images = odd_arrays | junk | arrays(np.uint8, st.tuples(st.integers(0, 40), st.integers(0, 40), st.just(3)))


@fuzz
@given(data=st.data())
def test_any_observation_becomes_actions_inside_the_limits_or_is_refused(processor, small_policy, observation, data):
    name = data.draw(st.sampled_from(["images", "text", "state", "actions"]))
    value = data.draw({"images": odd_images, "text": junk | st.text()}.get(name, odd_arrays | junk))
    with refusing("images", "text", "state", "actions"):
        inputs = processor(**observation | {name: value})
        assert all(torch.isfinite(tensor.float()).all() for tensor in inputs.values())
        if "labels" in inputs:
            assert torch.isfinite(small_policy(**inputs).loss)
        else:
            count = len(inputs["input_ids"])
            assert_chunks(processor.post_process_actions(small_policy.generate(**inputs)), processor, count)


@fuzz
@given(state=arrays(np.float64, (2,), elements=st.floats(allow_nan=False, allow_infinity=False)))
def test_any_finite_state_becomes_actions_inside_the_limits(processor, small_policy, observation, state):
    actions = processor.post_process_actions(small_policy.generate(**processor(**observation | {"state": state})))
    assert_chunks(actions, processor)


@fuzz
@given(data=st.data())
def test_any_generated_ids_become_actions_or_are_refused(processor, small_policy, observation, data):
    prompt = processor(**observation)["input_ids"]
    new = data.draw(arrays(np.int64, (1, data.draw(st.integers(0, 20))), elements=st.integers(-5, 900)))
    ids = data.draw(odd_arrays | junk | st.just(torch.cat([prompt, torch.from_numpy(new)], dim=1)))
    with failing():
        actions = processor.post_process_actions(ids)
        assert_chunks(actions, processor, len(actions))
    with failing():
        processor.report(ids, observation["state"])


def use_processor(folder, small_policy, observation):
    processor = SmolAndFastProcessor.from_pretrained(folder)
    inputs = processor(**observation)
    assert_chunks(processor.post_process_actions(small_policy.generate(**inputs)), processor)


PROCESSOR_FILES = ["processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


@fuzz
@given(name=st.sampled_from(PROCESSOR_FILES), mutations=mutations)
def test_any_bytes_as_processor_files(folder, small_policy, observation, name, mutations):
    path = folder / name
    with changed(path, mutate_bytes(path.read_bytes(), mutations)), failing():
        use_processor(folder, small_policy, observation)


@fuzz
@given(name=st.sampled_from(["processor_config.json", "tokenizer_config.json", "tokenizer.json"]), data=st.data())
def test_any_fields_in_processor_files(folder, small_policy, observation, name, data):
    path = folder / name
    content, _ = mutate_json(json.loads(path.read_text()), data.draw)
    with changed(path, json.dumps(content).encode()), failing():
        use_processor(folder, small_policy, observation)


# The configuration and the checkpoint


@fuzz
@given(data=st.data())
def test_any_field_of_the_configuration_is_kept_or_refused(small_policy, data):
    content, _ = mutate_json(small_policy.config.to_dict(), data.draw)
    with failing():
        SmolAndFastConfig.from_dict(content)


@fuzz
@given(name=st.sampled_from(sorted(SmolAndFastConfig().to_dict())), value=junk)
def test_any_argument_of_the_configuration_is_kept_or_refused(name, value):
    with failing():
        SmolAndFastConfig(**{name: value})


def use_policy(folder, processor, observation):
    model = SmolAndFastForActionPrediction.from_pretrained(folder).eval()
    actions = processor.post_process_actions(model.generate(**processor(**observation)))
    assert_chunks(actions, processor)


@fuzz
@given(name=st.sampled_from(["config.json", "generation_config.json"]), data=st.data())
def test_any_fields_in_the_checkpoints_json(folder, processor, observation, name, data):
    path = folder / name
    content, _ = mutate_json(json.loads(path.read_text()), data.draw)
    with changed(path, json.dumps(content).encode()), failing():
        use_policy(folder, processor, observation)


@fuzz
@given(name=st.sampled_from(["config.json", "generation_config.json", "model.safetensors"]), mutations=mutations)
def test_any_bytes_as_checkpoint_files(folder, processor, observation, name, mutations):
    path = folder / name
    with changed(path, mutate_bytes(path.read_bytes(), mutations)), failing():
        use_policy(folder, processor, observation)


@fuzz
@given(data=st.data())
def test_any_header_of_the_weights(folder, processor, observation, data):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, _ = mutate_json(json.loads(content[8 : 8 + size]), data.draw)
    header = json.dumps(header).encode()
    with changed(path, len(header).to_bytes(8, "little") + header + content[8 + size :]), failing():
        use_policy(folder, processor, observation)


# The data reader


@pytest.fixture(scope="module")
def roots(tiny_source, tmp_path_factory):  # noqa: F811
    """A data set with videos, and one with its images inside parquet."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "videos": shutil.copytree(tiny_source, folder / "videos"),
        "images": write_demonstrations(folder / "images"),
    }


DATA_FILES = [
    *[("videos", name) for name in (INFO, "meta/tasks.parquet", EPISODES, DATA, FRONT, WRIST)],
    *[("images", name) for name in (INFO, DATA)],
]


def use_dataset(root, cache):
    shutil.rmtree(cache, ignore_errors=True)
    dataset = LeRobotChunkDataset(root, 4, cache_dir=cache)
    for i in (0, len(dataset) - 1):
        sample = dataset[i]
        assert np.isfinite(sample["state"]).all() and np.isfinite(sample["actions"]).all()
        assert isinstance(sample["text"], str) and sample["images"][0].dtype == np.uint8


@fuzz
@given(file=st.sampled_from(DATA_FILES), mutations=mutations)
def test_any_bytes_as_data_files(roots, tmp_path_factory, file, mutations):
    root, name = roots[file[0]], file[1]
    with changed(root / name, mutate_bytes((root / name).read_bytes(), mutations)), refusing(name, root.name):
        use_dataset(root, tmp_path_factory.getbasetemp() / "cache")


@fuzz
@given(file=st.sampled_from([file for file in DATA_FILES if file[1].endswith(".json")]), data=st.data())
def test_any_fields_in_data_files(roots, tmp_path_factory, file, data):
    path = roots[file[0]] / file[1]
    content, _ = mutate_json(json.loads(path.read_text()), data.draw)
    with changed(path, json.dumps(content).encode()), refusing(file[1], "image_keys"):
        use_dataset(path.parents[1], tmp_path_factory.getbasetemp() / "cache")


@fuzz
@given(file=st.sampled_from([file for file in DATA_FILES if file[1].endswith(".parquet")]), data=st.data())
def test_any_columns_in_data_files(roots, tmp_path_factory, file, data):
    path = roots[file[0]] / file[1]
    table = pq.read_table(path).to_pydict()
    name, row = data.draw(st.sampled_from(sorted(table))), data.draw(st.integers(0, 2))
    values = [data.draw(json_junk)] * len(table[name]) if row == 0 else [*table[name][1:], data.draw(json_junk)]
    with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeEncodeError):  # what no parquet file can hold
        pq.write_table(pa.table(table | {name: values}), buffer := pa.BufferOutputStream())
        with changed(path, buffer.getvalue().to_pybytes()), refusing(file[1], path.parent.name, file[0]):
            use_dataset(roots[file[0]], tmp_path_factory.getbasetemp() / "cache")
