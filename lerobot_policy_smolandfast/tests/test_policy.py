"""What LeRobot asks of a policy, and that all of it comes from our model and processor."""

import fnmatch
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ACTION_DIM,
    ACTION_NAMES,
    CAMERAS,
    CHUNK_SIZE,
    FPS,
    LENGTHS,
    STATE_DIM,
    STATE_NAMES,
    TASKS,
    make_config,
    make_tasks,
    save_checkpoint,
)
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.factory import make_policy as make_lerobot_policy
from lerobot.processor.converters import batch_to_transition
from lerobot.rollout.context import _wrap_predict_action_chunk_with_torch_compile
from lerobot.utils.feature_utils import dataset_to_policy_features
from lerobot.utils.import_utils import register_third_party_plugins
from PIL import Image
from transformers import AutoModel, AutoProcessor

from lerobot_policy_smolandfast import (
    SMOLANDFASTConfig,
    SMOLANDFASTPolicy,
    modeling_smolandfast,
    processor_smolandfast,
)
from lerobot_policy_smolandfast.convert_checkpoint import to_lerobot, to_transformers
from lerobot_policy_smolandfast.processor_smolandfast import read_demonstrations, read_frames, relative_statistics
from smolandfast import compute_statistics

UPLOADED = ("*.safetensors", "*.json", "*.yaml", "*.md")  # the files that push_model_to_hub takes


def test_lerobot_finds_the_plugin_and_its_classes_by_name():
    register_third_party_plugins()
    assert PreTrainedConfig.get_choice_class("smolandfast") is SMOLANDFASTConfig
    assert get_policy_class("smolandfast") is SMOLANDFASTPolicy


@pytest.mark.parametrize(
    "options",
    [{}, {"normalization": "quantiles", "dtype": "bfloat16", "n_state_bins": 64}, {"scale_factor": 2}],
    ids=["default", "quantiles_bfloat16", "scale_factor"],
)
def test_it_learns_and_predicts_with_any_cameras_and_dimensions(make_policy, batch, options):
    policy = make_policy(**options)
    optimizer = torch.optim.AdamW(policy.get_optim_params())
    losses = []
    for _ in range(4):
        loss, _ = policy.train().forward(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    chunk = policy.predict_action_chunk(batch)
    assert chunk.shape == (3, CHUNK_SIZE, ACTION_DIM) and chunk.dtype == torch.float32 and chunk.isfinite().all()


def test_a_chunk_is_executed_before_the_next_is_predicted(make_policy, batch, monkeypatch):
    policy = make_policy(n_action_steps=4)
    chunk = policy.predict_action_chunk(batch)
    asked = []
    monkeypatch.setattr(policy, "predict_action_chunk", lambda *args, **kwargs: asked.append(1) or chunk)
    actions = [policy.select_action(batch) for _ in range(5)]
    assert len(asked) == 2 and actions[0].shape == (3, ACTION_DIM)
    for step, action in enumerate(actions):
        assert torch.equal(action, chunk[:, step % 4])
    policy.reset()
    assert torch.equal(policy.select_action(batch), chunk[:, 0]) and len(asked) == 3


def test_an_environment_gets_the_same_actions_alone_and_in_a_batch(make_policy, batch):
    policy = make_policy()
    together = policy.predict_action_chunk(batch)
    for i in range(3):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        torch.testing.assert_close(policy.predict_action_chunk(alone), together[i : i + 1])


def test_states_and_actions_are_normalised_once(make_policy, dataset, batch):
    policy = make_policy(normalization="quantiles")
    for key, found in (("observation.state", policy.processor.statistics), ("action", policy.processor.statistics)):
        for name in ("min", "max", "q01", "q99"):
            np.testing.assert_array_equal(found[key][name], dataset.stats[key][name])
    before, after = make_pre_post_processors(policy.config, dataset_stats=dataset.stats)
    processed = before(batch)
    for key in ("observation.state", "action", *CAMERAS):
        assert torch.equal(processed[key], batch[key])
    chunk = policy.predict_action_chunk(batch)
    assert torch.equal(after(chunk), chunk)
    assert (chunk.numpy() >= dataset.stats["action"]["min"] - 1e-5).all()


INPUTS = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "labels")


def test_the_pre_processor_turns_a_training_batch_into_inputs(make_policy, batch):
    policy = make_policy()
    before, _ = make_pre_post_processors(policy.config)
    prepared = before(batch)
    images = [[Image.fromarray(to_array(batch[key][i])) for key in CAMERAS] for i in range(3)]
    expected = policy.processor(images, batch["task"], batch["observation.state"], batch["action"])
    assert set(expected) == set(INPUTS)
    for name in INPUTS:
        assert torch.equal(prepared[name], expected[name])
    assert torch.equal(policy(prepared)[0], policy(batch)[0])
    # With mixed precision, FSDP rounds every float tensor that `forward` receives.
    floats = [name for name, x in prepared.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    rounded = {name: prepared[name].bfloat16().float() for name in floats if name != "pixel_values"}
    assert "observation.state" in rounded and torch.equal(policy({**prepared, **rounded})[0], policy(batch)[0])
    chunk = policy.predict_action_chunk(prepared)
    assert torch.equal(chunk, policy.predict_action_chunk(batch))


def test_the_pre_processor_leaves_observations_to_the_policy(make_policy, batch, monkeypatch):
    policy = make_policy(n_action_steps=4)
    before, _ = make_pre_post_processors(policy.config)
    observation = {key: value for key, value in batch.items() if key != "action"}
    calls, kind = [], type(policy.processor)
    process = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *args, **options: calls.append(1) or process(*args, **options))
    for _ in range(5):
        policy.select_action(before(observation))
    assert len(calls) == 2  # once for each chunk, not for each action


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_images_are_rounded_as_the_processor_rounds_them(make_policy, batch, dtype):
    policy = make_policy()
    for key in CAMERAS:
        if dtype == torch.uint8:
            batch[key] = (batch[key] * 255).round().to(dtype)
        else:
            batch[key] = torch.rand(batch[key].shape, dtype=dtype, generator=torch.manual_seed(0))
            batch[key].view(-1)[:256] = (torch.arange(256) + 0.5) / 255  # halves
    images = [[batch[key][i] for key in CAMERAS] for i in range(3)]
    expected = policy.processor(images, batch["task"], batch["observation.state"])
    before, _ = make_pre_post_processors(policy.config)
    assert torch.equal(before(batch)["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.5, float("inf")])
def test_images_out_of_range_are_refused(make_policy, batch, value):
    batch[CAMERAS[1]][1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"images\[1\].*expected \[0, 1\]"):
        make_policy()(batch)


def test_a_loaded_pipeline_uses_the_processor_of_the_loaded_policy(make_policy, batch, tmp_path):
    save_checkpoint(make_policy(), tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=[f"--default_task={TASKS[1]}"])
    policy = SMOLANDFASTPolicy.from_pretrained(tmp_path, config=config)
    before, _ = make_pre_post_processors(config, tmp_path)
    expected = before({**batch, "task": [TASKS[1]] * 3})
    found = before({**batch, "task": [""] * 3})
    for name in INPUTS:
        assert torch.equal(found[name], expected[name])
    assert torch.equal(policy(found)[0], policy({**batch, "task": [TASKS[1]] * 3})[0])


def test_a_checkpoint_without_the_step_still_trains_and_predicts(make_policy, batch, tmp_path):
    policy = make_policy()
    save_checkpoint(policy, tmp_path)
    path = tmp_path / "policy_preprocessor.json"
    pipeline = json.loads(path.read_text())
    pipeline["steps"] = [step for step in pipeline["steps"] if step["registry_name"] != "smolandfast_processor"]
    path.write_text(json.dumps(pipeline))
    loaded = SMOLANDFASTPolicy.from_pretrained(tmp_path)
    before, _ = make_pre_post_processors(loaded.config, tmp_path)
    assert "labels" not in before(batch)
    assert torch.equal(loaded(before(batch))[0], policy(batch)[0])
    assert torch.equal(loaded.predict_action_chunk(before(batch)), policy.predict_action_chunk(batch))


def test_pipelines_need_a_policy(make_policy, batch):
    with pytest.raises(ValueError, match="policy.config"):
        make_pre_post_processors(make_config())
    step = processor_smolandfast.SmolAndFastProcessorStep("0123456789abcdef")
    with pytest.raises(ValueError, match="'0123456789abcdef'"):
        step(batch_to_transition(batch))
    policy = make_policy()
    before, _ = make_pre_post_processors(policy.config)
    with pytest.raises(ValueError, match="has no observation.images.wrist"):
        before({key: value for key, value in batch.items() if key != CAMERAS[1]})


def to_array(image: torch.Tensor) -> np.ndarray:
    """Floats `(3, H, W)` in [0, 1] -> uint8 `(H, W, 3)`."""
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


EMPTY_TASKS = ["", " ", None, [""] * 3, [TASKS[0], None, TASKS[1]]]


@pytest.mark.parametrize("task", EMPTY_TASKS, ids=repr)
def test_an_empty_task_is_the_default_task_or_refused(make_policy, batch, task):
    policy, strict = make_policy(default_task=TASKS[1]), make_policy()
    empty = {**batch, "task": task}
    named = task if isinstance(task, list) else [task] * 3
    named = {**batch, "task": [name if name in TASKS else TASKS[1] for name in named]}
    assert torch.equal(policy.predict_action_chunk(empty), policy.predict_action_chunk(named))
    assert torch.equal(policy(empty)[0], policy(named)[0])
    assert not strict.config.default_task
    for call in (strict.forward, strict.predict_action_chunk, strict.select_action):
        with pytest.raises(ValueError, match=f"is empty.*{TASKS[0]}.*{TASKS[1]}"):
            call(empty)
    del empty["task"]
    policy.predict_action_chunk(empty)
    with pytest.raises(ValueError, match=f"is empty.*{TASKS[0]}.*{TASKS[1]}"):
        strict.predict_action_chunk(empty)


def test_a_default_task_given_on_the_command_line_helps_a_loaded_policy(make_policy, batch, tmp_path):
    make_policy().save_pretrained(tmp_path)
    empty = {**batch, "task": ""}
    with pytest.raises(ValueError, match="is empty"):
        SMOLANDFASTPolicy.from_pretrained(tmp_path).predict_action_chunk(empty)
    config = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=[f"--default_task={TASKS[1]}"])
    policy = SMOLANDFASTPolicy.from_pretrained(tmp_path, config=config)
    expected = policy.predict_action_chunk({**batch, "task": [TASKS[1]] * 3})
    assert torch.equal(policy.predict_action_chunk(empty), expected)


def test_a_data_sets_only_task_is_its_default_task(dataset):
    def make(tasks, **options):
        meta = SimpleNamespace(**{**vars(dataset), "tasks": make_tasks(*tasks)})
        return SMOLANDFASTPolicy(make_config(**options), dataset_stats=dataset.stats, dataset_meta=meta)

    assert make(TASKS[:1]).config.default_task == make(TASKS[:1]).processor.default_task == TASKS[0]
    for tasks in ([*TASKS, ""], [TASKS[0], " "], [""]):
        with pytest.raises(ValueError, match="The data set has an empty task"):
            make(tasks)
    policy = make([*TASKS, ""], default_task=TASKS[1])
    assert policy.processor.training_tasks and set(policy.processor.training_tasks) == set(TASKS)


def test_a_fine_tuned_policy_learns_the_tasks_of_its_new_data(make_policy, dataset, tmp_path):
    make_policy(default_task=TASKS[0]).save_pretrained(tmp_path)

    def load(*tasks, **options):
        meta = SimpleNamespace(**{**vars(dataset), "tasks": make_tasks(*tasks)})
        config = PreTrainedConfig.from_pretrained(
            tmp_path, cli_overrides=[f"--{name}={value}" for name, value in options.items()]
        )
        return SMOLANDFASTPolicy.from_pretrained(tmp_path, config=config, dataset_meta=meta)

    for tasks, options, default_task in (
        (["Wave."], {}, "Wave."),
        (["Wave.", "Bow."], {}, ""),
        (["Wave.", TASKS[0]], {}, TASKS[0]),
        (["Wave.", "Bow."], {"default_task": "Greet."}, "Greet."),
    ):
        policy = load(*tasks, **options)
        assert policy.config.default_task == policy.processor.default_task == default_task
        assert set(policy.processor.training_tasks) == {*TASKS, *tasks}
    with pytest.raises(ValueError, match="The data set has an empty task"):
        load("Wave.", "")


def test_a_state_outside_the_data_warns_once_with_the_joints_name(make_policy, dataset, batch, tmp_path, caplog):
    make_policy(normalization="quantiles").save_pretrained(tmp_path)
    policy = SMOLANDFASTPolicy.from_pretrained(tmp_path)
    low, high = (dataset.stats["observation.state"][name] for name in ("min", "max"))
    caplog.set_level("WARNING")
    policy.predict_action_chunk({**batch, "observation.state": torch.tensor(np.stack([low, high, low]))})
    assert "outside" not in caplog.text  # nor by the rounding of the state to float32
    outside = batch["observation.state"].clone()
    outside[1, 1] = high[1] + 12.5
    for _ in range(2):
        policy.predict_action_chunk({**batch, "observation.state": outside})
    [record] = [record for record in caplog.records if "outside" in record.message]
    numbers = [f"{x:.6g}" for x in np.float32([high[1] + 12.5, low[1], high[1]])]
    assert all(text in record.message for text in (STATE_NAMES[1], *numbers))
    assert not any(name in record.message for name in (STATE_NAMES[0], STATE_NAMES[2]))
    policy.config.state_names = None
    policy.predict_action_chunk({**batch, "observation.state": outside - 100})
    assert "observation.state[0]" in caplog.text


@pytest.mark.parametrize(
    "names",
    [["x", "y"], {"motors": ["x", "y"]}, {"axes": ["x", "y"]}, {"y": 1, "x": 0}, {"left": ["x"], "right": ["y"]}],
    ids=repr,
)
def test_joints_have_the_data_sets_names(names):
    config = SMOLANDFASTConfig(device="cpu")
    config.read_dataset_features({"observation.state": {"shape": [2], "names": names}})
    assert config.state_names == ["x", "y"] and config.action_names is None


@pytest.mark.parametrize("names", [None, ["x"], {"motors": ["x", "y", "z"]}, []], ids=repr)
def test_joints_without_fitting_names_have_none(names):
    config = SMOLANDFASTConfig(device="cpu")
    config.read_dataset_features({"observation.state": {"shape": [2], "names": names}})
    assert config.state_names is None


def test_each_part_has_its_learning_rate_and_frozen_parts_have_none(make_policy):
    policy = make_policy(vision_learning_rate=1e-5, text_learning_rate=3e-4, freeze_connector=True)
    rates = {id(p): group["lr"] for group in policy.get_optim_params() for p in group["params"]}
    for name, parameter in policy.named_parameters():
        expected = 1e-5 if "vision_model" in name else None if "connector" in name else 3e-4
        assert rates.get(id(parameter)) == expected
    scheduler = policy.config.get_scheduler_preset()
    assert (scheduler.peak_lr, scheduler.decay_lr) == (3e-4, 1e-5)


def test_relaxed_decoding_is_an_option(make_policy, batch):
    policy = make_policy(relaxed_decoding=True)
    assert policy.predict_action_chunk(batch).isfinite().all()


def test_what_is_uploaded_to_the_hub_loads_with_the_same_actions(make_policy, batch, tmp_path, monkeypatch, caplog):
    policy = make_policy(n_action_steps=3)
    policy.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").rglob("*.*"):
        name = path.relative_to(tmp_path / "saved")
        if any(fnmatch.fnmatch(str(name), pattern) for pattern in UPLOADED):
            (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "hub" / name)
    monkeypatch.setattr(modeling_smolandfast, "snapshot_download", lambda *args, **kwargs: tmp_path / "hub")
    caplog.set_level("INFO")
    loaded = SMOLANDFASTPolicy.from_pretrained("somebody/policy")
    assert f"--fps={FPS}" in caplog.text
    assert torch.equal(loaded.predict_action_chunk(batch), policy.predict_action_chunk(batch))
    assert loaded.config.n_action_steps == 3


def test_conversion_to_transformers_and_back_keeps_the_actions(make_policy, batch, tmp_path):
    policy = make_policy(relative_actions=False, normalization="quantiles")
    expected = policy.predict_action_chunk(batch)
    policy.save_pretrained(tmp_path / "lerobot")
    to_transformers(tmp_path / "lerobot", tmp_path / "transformers")
    model = AutoModel.from_pretrained(tmp_path / "transformers", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "transformers", trust_remote_code=True)
    images = list(zip(*(batch[key] for key in CAMERAS), strict=True))
    inputs = processor(images=images, text=batch["task"], state=batch["observation.state"])
    np.testing.assert_array_equal(processor.post_process_actions(model.generate(**inputs)), expected)
    assert processor.image_keys == list(CAMERAS) and processor.fps == FPS
    (tmp_path / "again").mkdir()  # an empty folder is as good as a new one
    to_lerobot(tmp_path / "transformers", tmp_path / "again")
    again = SMOLANDFASTPolicy.from_pretrained(tmp_path / "again")
    assert torch.equal(again.predict_action_chunk(batch), expected)
    assert again.config.image_features == policy.config.image_features  # their sizes too
    assert (again.config.state_names, again.config.action_names) == (STATE_NAMES, ACTION_NAMES)
    assert again.processor.fps == FPS and not again.config.gradient_checkpointing


def test_conversion_can_rename_cameras(make_policy, batch, tmp_path):
    names = ["observation.images.left", "observation.images.right"]
    policy = make_policy()
    policy.save_pretrained(tmp_path / "lerobot")
    for image_keys in (["one"], [*names, "three"], [names[0]] * 2):
        with pytest.raises(ValueError, match="image_keys is"):
            to_transformers(tmp_path / "lerobot", tmp_path / "renamed", image_keys)
    to_transformers(tmp_path / "lerobot", tmp_path / "transformers")
    renamed = {name: batch.pop(camera) for name, camera in zip(names, CAMERAS, strict=True)}
    expected = policy.predict_action_chunk({**batch, **dict(zip(CAMERAS, renamed.values(), strict=True))})
    to_lerobot(tmp_path / "transformers", tmp_path / "renamed", names)
    again = SMOLANDFASTPolicy.from_pretrained(tmp_path / "renamed")
    assert list(again.config.image_features) == again.processor.image_keys == names
    assert [x.shape for x in again.config.image_features.values()] == [(3, 48, 64)] * 2
    assert torch.equal(again.predict_action_chunk({**batch, **renamed}), expected)
    again.processor.check_model(again.model)


@pytest.mark.parametrize("convert", [to_transformers, to_lerobot])
def test_conversion_writes_to_a_new_folder_or_not_at_all(convert, make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path / "lerobot")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for output_dir in (tmp_path / "full", tmp_path / "full/notes.txt"):
        with pytest.raises(FileExistsError, match="is not an empty folder"):
            convert(tmp_path / "lerobot", output_dir)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError):
        convert(tmp_path / "full", tmp_path / "new")  # no checkpoint
    assert not (tmp_path / "new").exists()


def test_torch_compile_changes_nothing_and_says_so(make_policy, batch, caplog):
    policy = make_policy()
    expected = policy.predict_action_chunk(batch)
    assert "torch.compile" not in caplog.text
    assert _wrap_predict_action_chunk_with_torch_compile(policy, backend="inductor", mode="default")
    for delay in range(10):
        assert torch.equal(policy.predict_action_chunk(batch, inference_delay=delay), expected)
    with torch.inference_mode():
        assert torch.equal(policy.select_action(batch), expected[:, 0])
    assert len([record for record in caplog.records if "no effect" in record.message]) == 1


def test_a_fitted_tokenizer_serves_the_next_policy(make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path)
    folder = tmp_path / "smolandfast/action_tokenizer"
    tokenizer = make_policy(action_tokenizer=str(folder)).processor.action_tokenizer
    assert tokenizer.fit_report["num_chunks"] == sum(LENGTHS)


def test_chunks_end_with_their_episode(dataset):
    states, chunks = read_demonstrations(dataset.root, CHUNK_SIZE)
    np.testing.assert_array_equal(states, dataset.states)
    np.testing.assert_array_equal(chunks[0], dataset.actions[:CHUNK_SIZE])
    np.testing.assert_array_equal(chunks[38], dataset.actions[[38, 39, 39, 39, 39, 39]])
    np.testing.assert_array_equal(chunks[-1], dataset.actions[[-1] * CHUNK_SIZE])


JOINTS = ["elbow.pos", "shoulder.pos", "Gripper.pos", "lift"]  # of the action
REFERENCE_DIMS = [1, 0, None, None]


def test_joints_are_relative_by_name_and_some_stay_absolute(make_policy, dataset, batch, tmp_path):
    options = {"relative_actions": True, "relative_exclude_joints": ["gripper", "lift"], "action_names": JOINTS}
    policy = make_policy(**options)
    assert policy.processor.normalizer.reference_dims == REFERENCE_DIMS
    expected = compute_statistics(*read_demonstrations(dataset.root, CHUNK_SIZE), REFERENCE_DIMS)["relative_action"]
    for name, values in expected.items():
        np.testing.assert_allclose(policy.processor.statistics["relative_action"][name], values, rtol=1e-12)
    policy.save_pretrained(tmp_path / "saved")
    to_transformers(tmp_path / "saved", tmp_path / "transformers")
    to_lerobot(tmp_path / "transformers", tmp_path / "again")
    for folder in ("saved", "again"):
        loaded = SMOLANDFASTPolicy.from_pretrained(tmp_path / folder)
        assert loaded.config.relative_exclude_joints == ["gripper", "lift"]
        assert loaded.processor.normalizer.reference_dims == REFERENCE_DIMS
        assert torch.equal(loaded.predict_action_chunk(batch), policy.predict_action_chunk(batch))
    config = PreTrainedConfig.from_pretrained(tmp_path / "saved")
    config.relative_exclude_joints = ["gripper", "lift", "elbow"]
    with pytest.raises(
        ValueError, match=r"\['gripper', 'lift', 'elbow'\], but \['gripper', 'lift'\] in the checkpoint"
    ):
        SMOLANDFASTPolicy.from_pretrained(tmp_path / "saved", config=config)
    with pytest.raises(ValueError, match="has 'wrist'"):
        make_policy(**{**options, "relative_exclude_joints": ["wrist"]})


def test_images_keep_their_aspect_ratio_if_asked_to(make_policy, batch, tmp_path):
    policy = make_policy(resize_with_pad=True)
    images = [[Image.fromarray(to_array(batch[key][i])) for key in CAMERAS] for i in range(3)]
    expected = policy.processor(images, batch["task"], batch["observation.state"])["pixel_values"]
    pixels = make_pre_post_processors(policy.config)[0](batch)["pixel_values"]
    assert torch.equal(pixels, expected)
    side = pixels.shape[-1]
    bar = side // 8  # 48 x 64 pixels: a quarter of the square is black
    assert (pixels[..., :bar, :] == pixels.min()).all() and (pixels[..., side - bar :, :] == pixels.min()).all()
    assert pixels[..., bar, :].std() > 0.1 and pixels[..., side - bar - 1, :].std() > 0.1
    policy.save_pretrained(tmp_path)
    loaded = SMOLANDFASTPolicy.from_pretrained(tmp_path)
    assert loaded.config.resize_with_pad
    assert torch.equal(loaded.predict_action_chunk(batch), policy.predict_action_chunk(batch))


def test_statistics_of_relative_actions_cover_all_frames(dataset, monkeypatch):
    states, chunks = read_demonstrations(dataset.root, CHUNK_SIZE)
    expected = compute_statistics(states, chunks[..., :STATE_DIM])["relative_action"]
    monkeypatch.setattr(processor_smolandfast, "MAX_FITTED_CHUNKS", 5)
    states, actions, last = read_frames(dataset.root)
    found = relative_statistics(states, actions[:, :STATE_DIM], last, CHUNK_SIZE)
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12)


def test_a_tokenizer_is_fitted_to_as_many_frames_as_fit_into_memory(dataset, monkeypatch):
    monkeypatch.setattr(processor_smolandfast, "MAX_FITTED_VALUES", 10 * CHUNK_SIZE * ACTION_DIM)
    states, chunks = read_demonstrations(dataset.root, CHUNK_SIZE)
    assert len(states) == len(chunks) == 10
    np.testing.assert_array_equal(states[[0, -1]], dataset.states[[0, -1]])
    np.testing.assert_array_equal(
        chunks[:, 0], dataset.actions[np.linspace(0, sum(LENGTHS) - 1, 10).round().astype(int)]
    )


def test_cameras_have_the_data_sets_order_and_depth_maps_are_none(dataset, batch, tmp_path):
    depth = {"dtype": "video", "shape": (48, 64, 1), "names": ["height", "width", "channels"]}
    flagged = {**depth, "shape": (48, 64, 3), "info": {"is_depth_map": True}}
    features = {"observation.images.depth": depth, "observation.images.old_depth": flagged, **dataset.features}
    meta = SimpleNamespace(**{**vars(dataset), "features": features})
    config = make_config()
    config.input_features = dict(reversed(dataset_to_policy_features(features).items()))
    config.input_features.pop("action")
    policy = SMOLANDFASTPolicy(config, dataset_stats=dataset.stats, dataset_meta=meta)
    assert list(policy.config.image_features) == policy.processor.image_keys == list(CAMERAS)
    policy.save_pretrained(tmp_path)
    loaded = SMOLANDFASTPolicy.from_pretrained(tmp_path)
    assert torch.equal(loaded.predict_action_chunk(batch), policy.predict_action_chunk(batch))


@pytest.mark.parametrize("cameras", [CAMERAS[::-1], CAMERAS[:1], ("observation.images.top", CAMERAS[1])])
def test_other_cameras_than_the_weights_were_trained_with_are_refused(make_policy, tmp_path, cameras):
    make_policy().save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    image, state = config.input_features[CAMERAS[0]], config.input_features["observation.state"]
    config.input_features = {"observation.state": state, **dict.fromkeys(cameras, image)}
    with pytest.raises(ValueError) as error:
        SMOLANDFASTPolicy.from_pretrained(tmp_path, config=config)
    assert str(list(cameras)) in str(error.value) and str(list(CAMERAS)) in str(error.value)


def test_cameras_are_renamed_by_lerobots_rename_map(make_policy, batch, tmp_path):
    policy = make_policy()
    save_checkpoint(policy, tmp_path)
    overrides = {"rename_observations_processor": {"rename_map": {"observation.images.top": CAMERAS[0]}}}
    before, _ = make_pre_post_processors(policy.config, tmp_path, preprocessor_overrides=overrides)
    expected = policy.predict_action_chunk(batch)
    batch["observation.images.top"] = batch.pop(CAMERAS[0])
    assert torch.equal(policy.predict_action_chunk(before(batch)), expected)


def test_a_real_robots_data_set_gives_cameras_joints_tasks_and_rate(shared):
    meta = LeRobotDatasetMetadata("somebody/so101", root=shared / "data/so101")
    config = SMOLANDFASTConfig(vlm_model_name="tiny", device="cpu", relative_actions=True, push_to_hub=False)
    policy = make_lerobot_policy(config, ds_meta=meta)
    assert policy.processor.image_keys == meta.camera_keys and policy.processor.fps == meta.fps == 25
    assert policy.config.state_names == policy.config.action_names == meta.features["action"]["names"]
    assert policy.config.default_task == "" and len(policy.processor.training_tasks) == 3
    states, chunks = read_demonstrations(meta.root, 10)
    expected = compute_statistics(states, chunks)["relative_action"]
    found = policy.processor.statistics["relative_action"]
    np.testing.assert_allclose([found[name] for name in expected], list(expected.values()), rtol=1e-9)


def test_chunks_are_those_of_lerobots_loader(shared):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = shared / "data/pusht"
    times = {"action": [step / 10 for step in range(10)]}
    loader = LeRobotDataset("lerobot/pusht", root=root, delta_timestamps=times, video_backend="pyav")
    states, chunks = read_demonstrations(root, 10)
    assert len(states) == len(loader)
    for i in (0, 155, 160, 25_649):
        sample = loader[i]
        np.testing.assert_array_equal(states[i], sample["observation.state"])
        np.testing.assert_array_equal(chunks[i], sample["action"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "int8"}, "dtype is 'int8', expected one of float32, bfloat16"),
        ({"normalization": "mean_std"}, "normalization is 'mean_std'"),
        ({"n_action_steps": 7}, "n_action_steps is 7, more than the chunk_size of 6"),
        ({"chunk_size": 0, "n_action_steps": 0}, "chunk_size is 0"),
        ({"n_obs_steps": 2}, "n_obs_steps is 2"),
        ({"fast_scale": 0}, "fast_scale is 0"),
        ({"fast_scale": float("nan")}, "fast_scale is nan"),
        ({"fast_vocab_size": 0}, "fast_vocab_size is 0"),
        ({"n_state_bins": 0}, "n_state_bins is 0"),
        ({"scale_factor": 0}, "scale_factor is 0"),
        ({"text_learning_rate": 0}, "text_learning_rate is 0"),
        ({"vision_learning_rate": -1.0}, "vision_learning_rate is -1"),
        ({"connector_learning_rate": float("inf")}, "connector_learning_rate is inf"),
        ({"scheduler_decay_lr": float("nan")}, "scheduler_decay_lr is nan"),
        ({"do_image_splitting": True}, "tiny preset"),
        ({"do_image_splitting": True, "resize_with_pad": True, "vlm_model_name": "x"}, "resize_with_pad is set"),
        ({"relative_exclude_joints": ["gripper"]}, "--policy.relative_actions=true"),
        ({"normalization_mapping": {"ACTION": NormalizationMode.MIN_MAX}}, "--policy.normalization"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_data_that_does_not_fit_is_refused(make_policy, dataset, batch, tmp_path):
    policy = make_policy()
    with pytest.raises(ValueError, match="has no observation.images.wrist"):
        policy.predict_action_chunk({key: value for key, value in batch.items() if key != CAMERAS[1]})
    with pytest.raises(ValueError, match="has no action"):
        policy.forward({key: value for key, value in batch.items() if key != "action"})
    with pytest.raises(ValueError, match="A new policy needs a data set"):
        SMOLANDFASTPolicy(make_config())
    with pytest.raises(ValueError, match="action_names has 'a'"):
        make_policy(relative_actions=True)  # three numbers of state, four of action, other names
    unnamed = {key: {**feature, "names": None} for key, feature in dataset.features.items()}
    meta = SimpleNamespace(**{**vars(dataset), "features": unnamed})
    with pytest.raises(ValueError, match="relative_actions is set"):
        SMOLANDFASTPolicy(make_config(relative_actions=True), dataset_stats=dataset.stats, dataset_meta=meta)
    with pytest.raises(ValueError, match="action_names is .*, expected 4"):
        make_policy(action_names=["a"])
    config = make_config()
    config.input_features = {"observation.state": config.input_features["observation.state"]}
    with pytest.raises(ValueError, match="expected at least one camera"):
        SMOLANDFASTPolicy(config, dataset_stats=dataset.stats, dataset_meta=dataset)
    with pytest.raises(ValueError, match="no parquet files"):
        read_demonstrations(tmp_path, 6)


def test_a_checkpoint_is_loaded_as_it_is_or_not_at_all(make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chunk_size is 8, but 6 in the checkpoint"):
        SMOLANDFASTPolicy.from_pretrained(tmp_path, config=make_config(chunk_size=8, scale_factor=3))
    with pytest.raises(ValueError, match="convert_checkpoint"):
        SMOLANDFASTPolicy.from_pretrained(tmp_path / "smolandfast")
