"""A deployed policy predicts what its checkpoint predicts, refuses what its processor refuses, without PyTorch."""

import json
import logging
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from conftest import CHUNK_SIZE, TASK, make_processor, save_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_fuzz import fuzz, junk, odd_arrays, odd_images

from smolandfast import SmolAndFastProcessor, compute_statistics
from smolandfast.deployment import runtime
from smolandfast.deployment.runtime import DECODER, EMBEDDINGS, FILES, POLICY, VISION, DeployedPolicy
from smolandfast.files_smolandfast import SUMS, read_checksums, write_checksums
from smolandfast.training import make_tiny_processor

export = pytest.importorskip("smolandfast.deployment.export", reason='needs pip install -e ".[deployment]"')
import export_policy  # noqa: E402
import onnx  # noqa: E402

BACKENDS = ["onnxruntime", "openvino"]
GRAPHS = [VISION, DECODER, EMBEDDINGS]
ROOT = Path(__file__).parents[1]


def copy_graphs(deployed: Path):
    """Replaces the export of graphs, which takes seconds, by a copy of those that are there."""
    return lambda model, processor, folder: [shutil.copy(deployed / name, folder) for name in GRAPHS]


@pytest.fixture(scope="module")
def int8(saved_policy, deployed, tmp_path_factory) -> Path:
    """The same policy with weights of eight bits, which replaces an earlier export."""
    folder = shutil.copytree(deployed, tmp_path_factory.mktemp("int8") / "policy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export_graphs", copy_graphs(deployed))
        export.export_policy(saved_policy, folder, "int8")
    return folder


@pytest.fixture(scope="module")
def stock(saved_policy):
    return evaluate.load_policy(saved_policy, dtype=torch.float32)


def observations(image_keys):
    """Images of several sizes and kinds, one sample and many, by position and by name."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((96, 96, 3), (50, 120, 3), (3, 200, 130))]
    states = rng.uniform(50, 450, (3, 2))
    for image, state in zip(images, states, strict=True):
        yield {"images": image, "text": TASK, "state": state}
    yield {"images": images, "text": [TASK, "Do something else.", ""], "state": states}
    yield {"images": Image.fromarray(images[1]), "state": states[0].astype(np.float32)}
    yield {"images": (images[0] / 255).astype(np.float32), "state": states[0].tolist()}
    yield {"images": dict.fromkeys(image_keys, images), "state": states}
    yield {"images": [dict.fromkeys(image_keys, image) for image in images[:2]], "state": states[:2]}


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_and_reports_are_those_of_the_checkpoint(deployed, stock, backend):
    pytest.importorskip(backend)
    policy = DeployedPolicy(deployed, backend)
    check_equal(policy, *stock, observations(policy.image_keys))


SIGNALLED = """
import signal
from smolandfast_runtime import DeployedPolicy
signals = []
signal.signal(signal.SIGINT, lambda *_: signals.append("seen"))
for backend in sys.argv[2:]:
    first, second = (DeployedPolicy(sys.argv[1], backend) for _ in range(2))
    del first
    signal.raise_signal(signal.SIGINT)
    del second
    signal.raise_signal(signal.SIGINT)
print(*signals)
"""


def test_a_signal_is_delivered_when_policies_have_been_freed(deployed):
    """With a core for each policy, OpenVINO's signal stack is freed memory then, where the processor has AMX."""
    for backend in BACKENDS:
        pytest.importorskip(backend)
    start = f"import sys\nsys.modules['torch'] = None\nsys.path.insert(0, {str(deployed)!r})\n"
    command = [sys.executable, "-c", start + SIGNALLED, deployed, *BACKENDS]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "seen seen seen seen\n"), result.stderr


def test_chunks_of_fast_plus_are_too(fast_plus, demonstrations, tmp_path):
    """Its tokens may end inside a character, and hold more coefficients than a chunk has."""
    statistics = compute_statistics(*demonstrations)
    processor = make_tiny_processor(fast_plus, statistics, TASK, chunk_size=CHUNK_SIZE)
    checkpoint = save_policy(tmp_path / "checkpoint", processor)
    export.export_policy(checkpoint, tmp_path / "policy")
    policy, stock = DeployedPolicy(tmp_path / "policy"), evaluate.load_policy(checkpoint, dtype=torch.float32)
    check_equal(policy, *stock, observations(policy.image_keys))


def check_equal(policy, model, processor, observations):
    for observation in observations:
        output = model.generate(**processor(**observation), return_dict_in_generate=True, output_scores=True)
        found, expected = policy.report(**observation), processor.report(output, observation["state"])
        np.testing.assert_array_equal(found["actions"], processor.post_process_actions(output))
        np.testing.assert_array_equal(policy.predict(**observation), found["actions"])
        np.testing.assert_allclose(found["log_probability"], expected["log_probability"], atol=1e-4)
        assert found["is_whole"].all()
        chunks = processor.action_tokenizer.decode_actions(found["tokens"], policy.chunk_size, policy.action_dim)
        bins = processor.normalizer.state_bins(np.atleast_2d(observation["state"]))
        np.testing.assert_array_equal(processor.normalizer.unnormalize_actions(chunks, bins), found["actions"])
        for name in ("clipped_actions", "clamped_states"):
            np.testing.assert_array_equal(found[name], expected[name])


def test_chunks_of_two_cameras_padded_images_and_an_absolute_gripper_are_too(demonstrations, tmp_path):
    keys = ["observation.images.front", "observation.images.wrist"]
    joints = {"state_names": ["x", "gripper"], "action_names": ["x", "gripper"]}
    options = {"relative_exclude_joints": ["gripper"], "resize_with_pad": True, "image_keys": keys, **joints}
    processor = make_processor(demonstrations, use_relative_actions=True, **options)
    checkpoint, folder = save_policy(tmp_path / "checkpoint", processor), tmp_path / "it's a policy"
    export.export_policy(checkpoint, folder)
    policy, stock = DeployedPolicy(folder), evaluate.load_policy(checkpoint, dtype=torch.float32)
    assert policy.normalizer.reference_dims == [0, None]
    rng = np.random.default_rng(0)
    front, wrist = (rng.integers(0, 256, size, dtype=np.uint8) for size in ((50, 120, 3), (200, 130, 3)))
    images = ([front, wrist], {keys[1]: wrist, keys[0]: front})
    check_equal(policy, *stock, [{"images": pair, "state": [200.0, 300.0]} for pair in images])
    assert policy.image_keys == keys and policy.fps is None
    with pytest.raises(ValueError, match="has 1 images, expected 2.*front, observation.images.wrist"):
        policy.predict(front, state=[200.0, 300.0])
    check_readme(folder, keys)


def check_readme(folder, image_keys):
    """Its commands name the folder whatever its name, and its example runs and shows the policy's cameras."""
    readme = (folder / "README.md").read_text()
    install = next(line for line in readme.splitlines() if "pip install" in line)
    assert shlex.split(install) == ["pip", "install", f"./{folder.name}"]
    code = readme.split("```python\n")[1].split("```")[0]
    assert all(repr(key) in code for key in image_keys)
    start = f"import sys\nsys.path.insert(0, {str(folder)!r})\n"
    result = subprocess.run([sys.executable, "-c", start + code], cwd=folder.parent, capture_output=True, text=True)
    assert result.stdout.strip() == f"(1, {CHUNK_SIZE}, 2)", result.stderr


def test_the_readme_names_the_control_rate(deployed):
    readme = (deployed / "README.md").read_text()
    assert "fps=policy.fps, n_action_steps=4, policy_fps=policy.fps" in readme
    check_readme(deployed, ["observation.image"])


def test_a_prompt_that_leaves_no_positions_for_a_chunk_is_refused(deployed, stock, monkeypatch):
    policy, (model, processor) = DeployedPolicy(deployed), stock
    limit = model.config.text_config.max_position_embeddings
    assert policy._max_positions == limit
    monkeypatch.setattr(policy, "_decoder", None)
    for text in ("word " * limit, ["short", "word " * limit]):
        observation = {"images": np.zeros((96, 96, 3), np.uint8), "text": text, "state": [200.0, 300.0]}
        if isinstance(text, list):
            observation |= {"images": [observation["images"]] * 2, "state": [observation["state"]] * 2}
        refused = outcome(policy.predict, **observation)
        assert f"more than the model's {limit} positions (max_position_embeddings)" in refused
        assert refused == outcome(processor, **observation)


def test_what_the_model_config_says_is_there(deployed, stock):
    policy, config = DeployedPolicy(deployed), stock[0].config
    assert (policy.chunk_size, policy.n_action_steps, policy.action_dim) == (config.chunk_size, 4, config.action_dim)
    assert (
        policy.image_keys == stock[1].image_keys
        and policy.fps == 10
        and policy.state_dim == 2
        and (policy.state_names, policy.action_names) == (["x", "y"], None)
        and policy.training_tasks == stock[1].training_tasks
    )


def outcome(call, *args, **kwargs):
    """What a call returns, or the words that it is refused with."""
    try:
        return call(*args, **kwargs)
    except ValueError as error:
        return str(error)


@fuzz
@given(data=st.data())
def test_any_observation_is_refused_with_the_words_of_the_processor_or_taken(deployed, stock, data):
    model, processor = stock
    observation = {"images": np.zeros((96, 96, 3), np.uint8), "text": TASK, "state": np.array([200.0, 300.0])}
    name = data.draw(st.sampled_from(sorted(observation)))
    odd = {"images": odd_images, "text": junk | st.text()}
    value = data.draw(odd.get(name, odd_arrays | junk))
    observation |= {name: value}
    inputs = outcome(processor, **observation)
    found = outcome(DeployedPolicy.predict, POLICIES.setdefault(deployed, DeployedPolicy(deployed)), **observation)
    if isinstance(inputs, str):
        assert found == inputs
    elif not isinstance(found, str):
        np.testing.assert_array_equal(found, processor.post_process_actions(model.generate(**inputs)))
    else:
        assert "images a sample" in found  # a processor takes any number of cameras


POLICIES: dict[Path, DeployedPolicy] = {}


@settings(fuzz, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), sharpness=st.sampled_from([0.0, 1.0, 1e30]))
def test_any_scores_are_written_as_a_whole_chunk(deployed, seed, sharpness):
    policy, rng = POLICIES.setdefault(deployed, DeployedPolicy(deployed)), np.random.default_rng(seed)
    decoder = policy._decoder

    def play_dice(inputs):
        scores, *cache = decoder(inputs)
        return [rng.normal(0, 1, scores.shape) * sharpness, *cache]

    policy._decoder = play_dice
    try:
        found = policy.report(np.zeros((96, 96, 3), np.uint8), TASK, [200.0, 300.0])
    finally:
        policy._decoder = decoder
    low, high = policy.normalizer.action_limits
    assert found["actions"].shape == (1, policy.chunk_size, policy.action_dim)
    assert (found["actions"] >= low.astype(np.float32)).all() and (found["actions"] <= high.astype(np.float32)).all()
    assert np.isfinite(found["log_probability"]).all() and (found["log_probability"] <= 0).all()


def test_scores_that_are_not_finite_are_refused(deployed):
    policy = DeployedPolicy(deployed)
    decoder = policy._decoder
    policy._decoder = lambda inputs: [np.full_like(decoder(inputs)[0], np.nan), *decoder(inputs)[1:]]
    with pytest.raises(ValueError, match="no action can be chosen"):
        policy.predict(np.zeros((96, 96, 3), np.uint8), TASK, [200.0, 300.0])


def test_a_new_sentence_is_warned_of_once(deployed, caplog):
    policy = DeployedPolicy(deployed)
    with caplog.at_level(logging.WARNING, "smolandfast"):
        for _ in range(2):
            policy.predict(np.zeros((96, 96, 3), np.uint8), "Fetch tea.", [200.0, 300.0])
    assert [("Fetch tea." in message, TASK in message) for message in caplog.messages] == [(True, True)]


WITHOUT_PYTORCH = """
import sys
for name in ("torch", "transformers", "scipy", "huggingface_hub", "safetensors", "onnx", "smolandfast"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import numpy as np
from smolandfast_runtime import DeployedPolicy

policy = DeployedPolicy(sys.argv[1], num_threads=1)
np.save(sys.argv[2], policy.predict(np.zeros((96, 96, 3), np.uint8), state=[200.0, 300.0]))
"""


def test_the_folder_runs_by_itself(deployed, stock, tmp_path):
    folder = shutil.copytree(deployed, tmp_path / "elsewhere")
    command = [sys.executable, "-c", WITHOUT_PYTORCH, folder, tmp_path / "chunk.npy"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    model, processor = stock
    expected = model.generate(**processor(np.zeros((96, 96, 3), np.uint8), None, [200.0, 300.0]))
    np.testing.assert_array_equal(np.load(tmp_path / "chunk.npy"), processor.post_process_actions(expected))


def test_the_code_that_travels_is_all_that_it_imports(deployed):
    for path in (deployed / "smolandfast_runtime").rglob("[!_]*.py"):
        name = path.relative_to(deployed / "smolandfast_runtime")
        assert path.read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_or_missing_file_is_refused(deployed, tmp_path, name):
    folder = shutil.copytree(deployed, tmp_path / "damaged")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(OSError, match=name):
        DeployedPolicy(folder)
    (folder / name).unlink()
    with pytest.raises(OSError, match=name):
        DeployedPolicy(folder)


def test_a_folder_without_checksums_or_of_another_kind_is_refused(deployed, saved_policy, tmp_path):
    folder = shutil.copytree(deployed, tmp_path / "damaged")
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    (folder / SUMS).write_text("".join(line for line in lines if VISION not in line))
    with pytest.raises(OSError, match=f"{VISION} is not what was saved.*says nothing"):
        DeployedPolicy(folder)
    (folder / SUMS).unlink()
    with pytest.raises(OSError, match=SUMS):
        DeployedPolicy(folder)
    with pytest.raises(OSError, match="it is not a deployed policy"):
        DeployedPolicy(saved_policy)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 1}, "has format 1, this code reads 3"),
        ({"cache": [1, 4, 32]}, "cannot be used"),
        ({"actions": {}}, "cannot be used: KeyError"),
        ({"normalizer": {"statistics": {}}}, "cannot be used: ValueError: statistics.*is None"),
        (
            {
                "pixels": {
                    "side": 64,
                    "resample": 1,
                    "with_pad": False,
                    "rescale_factor": 1 / 255,
                    "mean": [0.5] * 3,
                    "std": [0.5] * 3,
                }
            },
            "used",
        ),
    ],
    ids=["format", "cache", "actions", "statistics", "image size"],
)
def test_parts_that_do_not_fit_together_are_refused(deployed, tmp_path, changes, words):
    folder = shutil.copytree(deployed, tmp_path / "changed")
    about = json.loads((folder / POLICY).read_text()) | changes
    (folder / POLICY).write_text(json.dumps(about))
    write_checksums(folder, FILES)
    with pytest.raises(ValueError, match=words):
        DeployedPolicy(folder)


def test_a_graph_that_is_none_is_refused(deployed, tmp_path):
    folder = shutil.copytree(deployed, tmp_path / "changed")
    (folder / DECODER).write_bytes(b"no graph")
    write_checksums(folder, FILES)
    for backend in BACKENDS:
        pytest.importorskip(backend)
        with pytest.raises(ValueError, match="cannot be used"):
            DeployedPolicy(folder, backend)


def test_options_that_do_not_exist_are_refused(deployed):
    with pytest.raises(ValueError, match="backend is 'tensorflow', expected one of onnxruntime, openvino"):
        DeployedPolicy(deployed, "tensorflow")
    with pytest.raises(ValueError, match="num_threads is 0"):
        DeployedPolicy(deployed, num_threads=0)
    with pytest.raises(ValueError, match="device is 'CUDAExecutionProvider', expected one of"):
        DeployedPolicy(deployed, device="CUDAExecutionProvider")


def test_weights_of_eight_bits_are_nearly_the_same(deployed, int8):
    graphs = [onnx.load(folder / DECODER).graph for folder in (int8, deployed)]
    small, large = (sum(len(weights.raw_data) for weights in graph.initializer) for graph in graphs)
    assert 0 < small < 0.5 * large  # of the head too, which stays in float32
    policy, exact = DeployedPolicy(int8), DeployedPolicy(deployed)
    for observation in observations(policy.image_keys):
        found, expected = policy.report(**observation), exact.report(**observation)
        assert np.isfinite(found["actions"]).all()
        np.testing.assert_allclose(found["log_probability"], expected["log_probability"], atol=1)


def test_a_policy_that_came_out_different_is_not_left_behind(deployed, saved_policy, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "export_graphs", copy_graphs(deployed))
    before = runtime.to_pixel_values
    monkeypatch.setattr(runtime, "to_pixel_values", lambda *args: 0.9 * before(*args))
    with pytest.raises(ValueError, match="The exported policy is not the same"):
        export.export_policy(saved_policy, tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_an_export_replaces_an_earlier_one_and_nothing_else(
    deployed, int8, saved_policy, tmp_path, capsys, monkeypatch
):
    folder = shutil.copytree(int8, tmp_path / "policy")
    assert read_checksums(folder / SUMS)[DECODER] != read_checksums(deployed / SUMS)[DECODER]
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(read_checksums(folder / SUMS)) == written - {SUMS}
    monkeypatch.setattr(export, "SmolAndFastForActionPrediction", None)  # refused before it is loaded
    own = shutil.copytree(saved_policy, tmp_path / "own")

    def refused(output_dir):
        with pytest.raises(SystemExit) as stop:
            export_policy.main(["--checkpoint", str(own), "--output_dir", str(output_dir)])
        return stop.value.code == 2 and capsys.readouterr().err.strip().splitlines()[-1]

    for name in ("notes.txt", "recordings/episode_0", "smolandfast_runtime/mine.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("precious")
        assert name in refused(folder) and (folder / name).read_text() == "precious"
        (folder / name).unlink()
    (folder / "README.md").write_text("my notes")
    assert "README.md" in refused(folder) and (folder / "README.md").read_text() == "my notes"
    DeployedPolicy(folder)  # the notes are not read
    monkeypatch.chdir(own)
    for output_dir in (own, ".", "..", "../policy"):
        assert "did not write" in refused(output_dir)
    assert (own / "model.safetensors").is_file()


def test_a_policy_that_splits_images_is_refused(saved_policy, tmp_path, capsys):
    folder = shutil.copytree(saved_policy, tmp_path / "splitting")
    settings_file = folder / "processor_config.json"
    content = json.loads(settings_file.read_text())
    content["image_processor"]["do_image_splitting"] = True
    settings_file.write_text(json.dumps(content))
    fingerprint = SmolAndFastProcessor.from_pretrained(folder).fingerprint
    config = json.loads((folder / "config.json").read_text()) | {"processor_fingerprint": fingerprint}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        export_policy.main(["--checkpoint", str(folder), "--output_dir", str(tmp_path / "policy")])
    assert "splits images" in capsys.readouterr().err and not (tmp_path / "policy").exists()


def test_the_simulator_plays_a_deployed_policy(deployed, tmp_path, capsys):
    pytest.importorskip("gym_pusht")
    options = ["--episodes", "1", "--record", "0", "--output_dir", str(tmp_path)]
    evaluate.main(["--checkpoint", str(deployed), *options])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["backend"], metrics["n_episodes"]) == ("onnxruntime", 1)
    for wrong in (["--do_sample"], ["--dtype", "bfloat16"]):
        with pytest.raises(SystemExit):
            evaluate.main(["--checkpoint", str(deployed), *options, *wrong])
        assert "a deployed policy, which is greedy" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", str(ROOT / "checkpoints/pusht-tiny"), *options, "--backend", "openvino"])
    assert "is not a deployed policy" in capsys.readouterr().err


def test_a_chunk_that_is_cut_short_keeps_its_low_frequencies(deployed):
    policy, image, state = DeployedPolicy(deployed), np.zeros((96, 96, 3), np.uint8), [200.0, 300.0]
    whole = policy.report(image, TASK, state)
    assert whole["is_whole"].tolist() == [True]
    first = policy.report(image, TASK, state, max_tokens=1)
    assert first["is_whole"].tolist() == [False] and np.isfinite(first["actions"]).all()
    many = policy.report(image, TASK, state, max_tokens=1000, deadline=1000.0)
    np.testing.assert_array_equal(many["actions"], whole["actions"])
    late = policy.report(image, TASK, state, deadline=1e-9)
    np.testing.assert_array_equal(late["actions"], first["actions"])
    for wrong in ({"max_tokens": 0}, {"deadline": 0}, {"deadline": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            policy.predict(image, TASK, state, **wrong)


@settings(fuzz, max_examples=50)
@given(max_tokens=st.integers(1, 30), seed=st.integers(0, 100))
def test_what_is_not_written_of_a_chunk_is_zero(deployed, max_tokens, seed):
    """The frequencies of a chunk cut short are those of the whole one, then zeros."""
    policy, rng = POLICIES.setdefault(deployed, DeployedPolicy(deployed)), np.random.default_rng(seed)
    image = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
    ids = policy._write_prompt(TASK, np.array([1, 2]))
    whole, *_ = policy._write(ids, [image], np.inf, np.inf)
    part, log_probability, is_whole, tokens = policy._write(ids, [image], max_tokens, np.inf)
    same = whole.ravel() == part.ravel()
    length = len(same) if same.all() else int(same.argmin())
    assert (part.ravel()[length:] == 0).all() and is_whole == (is_whole and same.all()) and log_probability <= 0
    assert 0 < len(tokens) <= max_tokens
