"""What LeRobot asks of a policy, and that all of it comes from our model and processor."""

import fnmatch
import shutil

import numpy as np
import pytest
import torch
from conftest import ACTION_DIM, CAMERAS, CHUNK_SIZE, LENGTHS, TASKS, make_config
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
from transformers import AutoModel, AutoProcessor

from lerobot_policy_smolandfast import SMOLANDFASTConfig, SMOLANDFASTPolicy, modeling_smolandfast
from lerobot_policy_smolandfast.convert_checkpoint import to_lerobot, to_transformers
from lerobot_policy_smolandfast.processor_smolandfast import read_demonstrations

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


def test_an_empty_task_is_the_default_task(make_policy, batch):
    policy = make_policy(default_task=TASKS[1])
    empty, named = ({**batch, "task": [task] * 3} for task in ("", TASKS[1]))
    missing = {key: value for key, value in batch.items() if key != "task"}
    expected = policy.predict_action_chunk(named)
    assert torch.equal(policy.predict_action_chunk(empty), expected)
    assert torch.equal(policy.predict_action_chunk(missing), expected)
    assert make_policy().config.default_task == TASKS[0]


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


def test_what_is_uploaded_to_the_hub_loads_with_the_same_actions(make_policy, batch, tmp_path, monkeypatch):
    policy = make_policy(n_action_steps=3)
    policy.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").rglob("*.*"):
        name = path.relative_to(tmp_path / "saved")
        if any(fnmatch.fnmatch(str(name), pattern) for pattern in UPLOADED):
            (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "hub" / name)
    monkeypatch.setattr(modeling_smolandfast, "snapshot_download", lambda *args, **kwargs: tmp_path / "hub")
    loaded = SMOLANDFASTPolicy.from_pretrained("somebody/policy")
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
    to_lerobot(tmp_path / "transformers", tmp_path / "again", CAMERAS)
    again = SMOLANDFASTPolicy.from_pretrained(tmp_path / "again")
    assert torch.equal(again.predict_action_chunk(batch), expected)
    assert list(again.config.image_features) == list(CAMERAS)


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
        ({"do_image_splitting": True}, "tiny preset"),
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
    with pytest.raises(ValueError, match="A new policy needs a data set"):
        SMOLANDFASTPolicy(make_config())
    with pytest.raises(ValueError, match="relative_actions is set"):
        make_policy(relative_actions=True)  # three numbers of state, four of action
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
