"""The configuration: its defaults, the contradictions it refuses, and what it can be loaded from."""

import itertools
import json
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import BertConfig, Idefics3Config, SmolVLMConfig

from smolandfast import SmolAndFastConfig

SMOLVLM2 = Path(__file__).parents[2] / "shared" / "assets" / "smolvlm2_256m"
needs_smolvlm2 = pytest.mark.skipif(not SMOLVLM2.exists(), reason=f"SmolVLM2's files are not at {SMOLVLM2}")
ACTION_SIDE = {
    "chunk_size": 8,
    "n_action_steps": 4,
    "action_dim": 2,
    "action_token_base_id": 1000,
    "fast_token_lengths": [1, 1, 2, 5],
    "freeze_vision_tower": True,
    "freeze_connector": True,
}


def action_side(**changes):
    return {**ACTION_SIDE, **changes}


def test_the_defaults_are_the_documented_ones():
    config = SmolAndFastConfig()
    defaults = {
        "scale_factor": 1,
        "chunk_size": 10,
        "n_action_steps": 5,
        "freeze_vision_tower": False,
        "freeze_connector": False,
        "num_action_tokens": 0,
    }
    assert {name: getattr(config, name) for name in defaults} == defaults
    assert config.model_type == "smolandfast"


@pytest.mark.parametrize("scale_factor, image_seq_len", [(1, 1024), (2, 256), (4, 64)])
def test_an_image_takes_a_visual_token_for_each_group_of_patches(scale_factor, image_seq_len):
    vision_config = {"image_size": 512, "patch_size": 16}
    assert SmolAndFastConfig(vision_config=vision_config, scale_factor=scale_factor).image_seq_len == image_seq_len


@pytest.mark.parametrize("name", ["chunk_size", "n_action_steps", "action_dim", "scale_factor"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_that_are_not_above_zero_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value!r}, expected a whole number from 1 to"):
        SmolAndFastConfig(**action_side(**{name: value}))


@pytest.mark.parametrize(
    "name, value",
    [
        *itertools.product(["chunk_size", "n_action_steps", "scale_factor"], [2.0, "2", True, None]),
        *itertools.product(["action_dim", "action_token_base_id", "image_size"], [2.0, "2", True]),
        *itertools.product(["freeze_vision_tower", "freeze_connector"], [1, "yes", None]),
        ("fast_token_lengths", [1, "1"]),
        ("fast_token_lengths", "11"),
        ("fast_token_bytes", [0, 1]),
        ("processor_fingerprint", 7),
    ],
)
def test_a_field_of_another_type_is_refused(name, value, tmp_path):
    """By Transformers' own check, and on loading as a ValueError."""
    with pytest.raises(StrictDataclassError, match=f"field '{name}'"):
        SmolAndFastConfig(**action_side(**{name: value}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "smolandfast", **action_side(**{name: value})}))
    with pytest.raises(ValueError, match=f"The configuration cannot be used.*field '{name}'"):
        SmolAndFastConfig.from_pretrained(tmp_path)


def test_more_action_steps_than_a_chunk_holds_are_refused():
    assert SmolAndFastConfig(chunk_size=8, n_action_steps=8).n_action_steps == 8
    with pytest.raises(ValueError, match="n_action_steps is 9, more than the chunk_size of 8"):
        SmolAndFastConfig(chunk_size=8, n_action_steps=9)


@pytest.mark.parametrize(
    "image_size, patch_size, scale_factor, multiple", [(500, 16, 1, 16), (512, 16, 3, 48), (96, 16, 4, 64)]
)
def test_an_image_that_patches_and_scale_factor_do_not_divide_is_refused(
    image_size, patch_size, scale_factor, multiple
):
    vision_config = {"image_size": image_size, "patch_size": patch_size}
    with pytest.raises(ValueError, match=rf"scale_factor {scale_factor}.*image_size a multiple of {multiple},"):
        SmolAndFastConfig(vision_config=vision_config, scale_factor=scale_factor)


def test_the_images_may_be_smaller_than_the_towers_but_not_larger():
    tower = {"vision_config": {"image_size": 512, "patch_size": 16}}
    assert SmolAndFastConfig(**tower, image_size=384, scale_factor=3).image_seq_len == 64  # 512 would not divide
    for image_size in (576, 0):
        with pytest.raises(
            ValueError, match=f"image_size is {image_size!r}, expected .* at most the vision tower's 512"
        ):
            SmolAndFastConfig(**tower, image_size=image_size)
    with pytest.raises(ValueError, match="Make image_size a multiple of 64"):
        SmolAndFastConfig(**tower, image_size=272, scale_factor=4)


@pytest.mark.parametrize("missing", ["action_dim", "action_token_base_id", "fast_token_lengths"])
def test_an_action_side_that_is_half_filled_is_refused(missing):
    with pytest.raises(ValueError, match="half filled"):
        SmolAndFastConfig(**action_side(**{missing: None}))
    with pytest.raises(ValueError, match="half filled"):
        SmolAndFastConfig(**{missing: ACTION_SIDE[missing]})


def test_a_fitted_and_a_byte_level_vocabulary_at_once_are_refused():
    with pytest.raises(ValueError, match="half filled.*fast_token_lengths', 'fast_token_bytes'] are given"):
        SmolAndFastConfig(**action_side(fast_token_bytes=["00", "01"]))


@pytest.mark.parametrize("base_id", [-1, 2, 2000])
def test_action_tokens_outside_the_vocabulary_are_refused(base_id):
    text_config = {"model_type": "llama", "vocab_size": 2000}
    for fits in (3, 1999):
        SmolAndFastConfig(text_config=text_config, **action_side(action_token_base_id=fits))
    with pytest.raises(ValueError, match=rf"4 action tokens that end at id {base_id} .* vocabulary of 2000.*base_id"):
        SmolAndFastConfig(text_config=text_config, **action_side(action_token_base_id=base_id))


def test_a_contradiction_made_later_is_found_by_check():
    config = SmolAndFastConfig()
    config.n_action_steps = 11
    with pytest.raises(ValueError, match="n_action_steps is 11"):
        config.check()


@pytest.mark.parametrize(
    "tokens",
    [
        {"fast_token_lengths": [1, 1, 2, 5], "fast_token_bytes": None},
        {"fast_token_lengths": None, "fast_token_bytes": [*(f"{byte:02x}" for byte in range(256)), None, "c3a9"]},
    ],
)
def test_saving_keeps_the_action_side(tokens, tmp_path):
    config = SmolAndFastConfig(**action_side(**tokens))
    config.save_pretrained(tmp_path)
    loaded = SmolAndFastConfig.from_pretrained(tmp_path)
    expected = action_side(**tokens)
    assert {name: getattr(loaded, name) for name in expected} == expected
    assert loaded.num_action_tokens == config.num_action_tokens == len(next(filter(None, tokens.values())))
    assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "smolandfast"


def test_a_saved_configuration_names_its_code_for_the_auto_classes(tmp_path):
    SmolAndFastConfig(**ACTION_SIDE).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_smolandfast.SmolAndFastConfig"
    assert (tmp_path / "configuration_smolandfast.py").exists()


@needs_smolvlm2
def test_smolvlm2s_own_configuration_keeps_its_numbers():
    config = SmolAndFastConfig.from_pretrained(SMOLVLM2)
    stock = SmolVLMConfig.from_pretrained(SMOLVLM2)
    assert (config.scale_factor, config.image_seq_len, config.text_config.vocab_size) == (4, 64, 49280)
    assert config.vision_config.to_dict() == stock.vision_config.to_dict()
    assert config.text_config.to_dict() == stock.text_config.to_dict()
    assert config.image_token_id == stock.image_token_id == 49190
    assert config.model_type == "smolandfast"
    assert (config.chunk_size, config.n_action_steps, config.num_action_tokens) == (10, 5, 0)


@needs_smolvlm2
def test_keyword_arguments_override_a_checkpoints_numbers_and_are_checked():
    config = SmolAndFastConfig.from_pretrained(SMOLVLM2, scale_factor=1, **ACTION_SIDE)
    assert (config.scale_factor, config.image_seq_len) == (1, 1024)
    assert {name: getattr(config, name) for name in ACTION_SIDE} == ACTION_SIDE
    for name, value in {"n_action_steps": 99, "scale_factor": 3, "freeze_connector": "no"}.items():
        with pytest.raises(ValueError, match=name):
            SmolAndFastConfig.from_pretrained(SMOLVLM2, **{name: value})
    _, unused = SmolAndFastConfig.from_pretrained(SMOLVLM2, scale_factor=2, colour="red", return_unused_kwargs=True)
    assert unused == {"colour": "red"}


@pytest.mark.parametrize("stock_class", [SmolVLMConfig, Idefics3Config])
def test_smolvlm_and_idefics3_configurations_are_a_start(stock_class, tmp_path):
    vision_config = {"image_size": 96, "patch_size": 16}
    stock_class(vision_config=vision_config, scale_factor=2).save_pretrained(tmp_path)
    config = SmolAndFastConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.scale_factor, config.image_seq_len) == ("smolandfast", 2, 9)


def test_the_configuration_of_another_model_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type 'bert', expected 'smolandfast', or 'smolvlm'"):
        SmolAndFastConfig.from_pretrained(tmp_path)
