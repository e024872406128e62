"""The model: SmolVLM's numbers, a loss over the action span, and generate() that writes whole chunks only."""

import numpy as np
import pytest
import torch
from conftest import TASK, warnings_of
from torch.nn.functional import pad
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.utils import logging

from smolandfast import SmolAndFastConfig, SmolAndFastForActionPrediction, compute_statistics, modeling_smolandfast
from smolandfast.training import make_tiny_model, make_tiny_processor


def prompts(processor, batch):
    return processor(images=batch["images"], text=batch["text"], state=batch["state"])


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory):
    """A stock SmolVLM checkpoint of tiny size, with a scale factor of 2."""
    torch.manual_seed(0)
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 100,
            "pad_token_id": 0,
        },
        scale_factor=2,
        image_token_id=99,
    )
    folder = tmp_path_factory.mktemp("stock")
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    return folder


def stock_inputs(image_size=64, num_image_tokens=4, image_token=99):
    torch.manual_seed(1)
    ids = torch.cat([torch.full((2, num_image_tokens), image_token), torch.randint(1, 90, (2, 7))], dim=1)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 1, 3, image_size, image_size)}


def test_logits_are_stock_smolvlms_bit_for_bit(stock_folder):
    stock = SmolVLMForConditionalGeneration.from_pretrained(stock_folder).eval()
    ours = SmolAndFastForActionPrediction.from_pretrained(stock_folder).eval()
    assert ours.config.scale_factor == 2
    assert list(ours.state_dict()) == list(stock.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(**stock_inputs()).logits, stock(**stock_inputs()).logits)


@pytest.mark.slow
def test_logits_are_stock_smolvlms_bit_for_bit_at_the_real_size(smolvlm_assets, tmp_path):
    config = SmolVLMConfig.from_pretrained(smolvlm_assets)
    stock = SmolVLMForConditionalGeneration(config).eval()
    stock.save_pretrained(tmp_path)
    ours = SmolAndFastForActionPrediction.from_pretrained(tmp_path, dtype=torch.float32).eval()
    inputs = stock_inputs(512, 64, config.image_token_id)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)


def test_another_scale_factor_recreates_the_projection_alone(stock_folder, caplog):
    stock = SmolVLMForConditionalGeneration.from_pretrained(stock_folder).state_dict()
    logger = logging.get_logger("smolandfast.modeling_smolandfast")
    logger.addHandler(caplog.handler)
    model = SmolAndFastForActionPrediction.from_pretrained(stock_folder, scale_factor=1)
    logger.removeHandler(caplog.handler)
    assert "projection was re-created" in caplog.text
    changed = [k for k, v in model.state_dict().items() if v.shape != stock[k].shape or not torch.equal(v, stock[k])]
    assert changed == ["model.connector.modality_projection.proj.weight"]
    assert torch.isfinite(model.state_dict()[changed[0]]).all()
    with torch.no_grad():
        model(**stock_inputs(num_image_tokens=16))


def test_a_frozen_connector_that_had_to_be_recreated_is_refused(stock_folder):
    with pytest.raises(ValueError, match="freeze_connector is set, but scale_factor=1"):
        SmolAndFastForActionPrediction.from_pretrained(stock_folder, scale_factor=1, freeze_connector=True)
    model = SmolAndFastForActionPrediction.from_pretrained(
        stock_folder, freeze_connector=True, freeze_vision_tower=True
    )
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"text_model", "weight"}


def test_a_checkpoint_that_does_not_fit_is_refused(stock_folder, tmp_path):
    text_config = SmolAndFastConfig.from_pretrained(stock_folder).text_config.to_dict() | {"vocab_size": 50}
    with pytest.raises(ValueError, match="Only scale_factor may differ"):
        SmolAndFastForActionPrediction.from_pretrained(stock_folder, text_config=text_config)
    config = SmolAndFastConfig.from_pretrained(stock_folder)
    config.text_config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="lacks 9 of this model's weights"):
        SmolAndFastForActionPrediction.from_pretrained(stock_folder, config=config)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model type 'bert'"):
        SmolAndFastForActionPrediction.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "not safetensors"])
def test_a_damaged_weight_file_is_an_error(stock_folder, tmp_path, damage):
    for path in stock_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000] if damage == "truncated" else b"garbage" * 100)
    with pytest.raises(OSError, match="model.safetensors"):
        SmolAndFastForActionPrediction.from_pretrained(tmp_path)


def test_loss_and_gradients_are_those_of_the_full_logits(processor, model, batch):
    inputs = processor(**batch | {"text": ["a", "a longer task", "", "b"]})
    model.train()
    full = SmolVLMForConditionalGeneration.forward(model, **inputs)
    full.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ours = model(**inputs)
    ours.loss.backward()
    assert ours.logits.shape[1] < full.logits.shape[1] / 2
    torch.testing.assert_close(ours.loss, full.loss)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_num_items_in_batch_scales_the_loss(processor, model, batch):
    inputs = processor(**batch)
    count = int((inputs["labels"] != -100).sum())
    torch.testing.assert_close(model(**inputs, num_items_in_batch=2 * count).loss, model(**inputs).loss / 2)


def test_gradient_checkpointing_gives_the_same_gradients(processor, model, batch):
    inputs = processor(**batch)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(**inputs, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_labels_without_an_action_are_refused(processor, model, batch):
    inputs = processor(**batch)
    with pytest.raises(ValueError, match="every entry is -100"):
        model(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)})


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "temperature": 2.0}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}]
)
def test_generated_ids_become_one_chunk_each(processor, model, batch, options):
    actions = processor.post_process_actions(model.generate(**prompts(processor, batch), **options))
    assert actions.shape == (4, processor.chunk_size, 2) and np.isfinite(actions).all()


def test_the_batch_does_not_change_an_action(processor, model, batch):
    inputs = prompts(processor, batch | {"text": ["a", "a longer task", "", "b"]})
    together = processor.post_process_actions(model.generate(**inputs))
    for i in range(4):
        one = processor(images=batch["images"][i], text=["a", "a longer task", "", "b"][i], state=batch["state"][i])
        alone = processor.post_process_actions(model.generate(**one))
        np.testing.assert_allclose(alone[0], together[i])


def test_generate_encodes_the_image_once(processor, model, batch):
    calls = []
    model.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**prompts(processor, batch))
    assert len(calls) == 1


def test_options_that_cut_a_chunk_short_are_refused(processor, model, batch):
    inputs = prompts(processor, batch)
    for name, value in {"max_length": 50, "min_new_tokens": 4, "stop_strings": ["x"]}.items():
        with pytest.raises(ValueError, match=f"Drop {name}"):
            model.generate(**inputs, **{name: value})
    with pytest.raises(ValueError, match="input_ids is NoneType, expected a tensor"):
        model.generate(pixel_values=inputs["pixel_values"])


def test_a_training_batch_is_no_prompt(processor, model, batch):
    inputs = processor(**batch | {"text": ["a", "a longer task", "", "b"]})
    with pytest.raises(ValueError, match="training batch"):
        model.generate(**inputs)
    del inputs["labels"]
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(**inputs)


def test_a_chunk_the_tokenizer_was_not_fitted_for_is_refused(processor, model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chunk_size is 20, but 8 in .*processor.model_kwargs"):
        SmolAndFastForActionPrediction.from_pretrained(tmp_path, chunk_size=20)
    config = SmolAndFastConfig.from_pretrained(tmp_path, action_dim=4)
    with pytest.raises(ValueError, match="action_dim is 4, but 2 in"):
        SmolAndFastForActionPrediction.from_pretrained(tmp_path, config=config)
    other = SmolAndFastForActionPrediction.from_pretrained(tmp_path, n_action_steps=2, **processor.model_kwargs())
    processor.check_model(other)
    assert other.config.n_action_steps == 2
    other.config.chunk_size = 20
    with pytest.raises(ValueError, match="another model: chunk_size differ"):
        processor.check_model(other)


CALLS = {
    "generate": lambda model, inputs: model.generate(**{k: v for k, v in inputs.items() if k != "labels"}),
    "forward": lambda model, inputs: model(**{k: v for k, v in inputs.items() if k != "labels"}),
    "loss": lambda model, inputs: model(**inputs),
    "log_probability": lambda model, inputs: model.log_probability(**inputs),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: None,
        lambda pixels: pixels * 0,
        lambda pixels: torch.cat([pixels[:1] * 0, pixels[1:]]),
        lambda pixels: pixels[:1],
        lambda pixels: torch.cat([pixels, pixels], dim=1),
        lambda pixels: torch.stack([torch.cat([pixels[0], pixels[1]]), *[torch.cat([p, p * 0]) for p in pixels[2:]]]),
    ],
    ids=["missing", "zeros", "one of zeros", "of one sample", "too many", "of another sample"],
)
def test_image_tokens_without_their_images_are_refused(processor, model, batch, call, change):
    inputs = processor(**batch | {"text": ["the same"] * 4}) if call != "generate" else prompts(processor, batch)
    inputs["pixel_values"] = change(inputs["pixel_values"])
    with pytest.raises(ValueError, match="image tokens, and pixel_values has"):
        CALLS[call](model, inputs)


@pytest.mark.parametrize("call", CALLS)
def test_images_that_the_mask_hides_are_missing(processor, model, batch, call):
    inputs = processor(**batch) if call != "generate" else prompts(processor, batch)
    inputs["pixel_attention_mask"] = torch.zeros((4, 1, 96, 96), dtype=torch.long)
    with pytest.raises(ValueError, match="image tokens, and pixel_values has"):
        CALLS[call](model, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.ones(4, 1, 3, 64, 64)}, "pixel_values has shape .*64, 64.*expected"),
        ({"input_ids": torch.ones(5, dtype=torch.long)}, "input_ids is .*5.*expected a tensor"),
        ({"input_ids": torch.ones(1, 5)}, "input_ids is .*expected a tensor"),
        ({"input_ids": [[1, 2]]}, "input_ids is list, expected a tensor"),
        ({"attention_mask": torch.ones(4, 3)}, r"attention_mask has shape \(4, 3\)"),
    ],
)
def test_inputs_of_generate_that_do_not_fit_are_named(processor, model, batch, change, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{**prompts(processor, batch), **change})


def test_labels_of_another_length_are_refused(processor, model, batch):
    inputs = processor(**batch)
    for labels in (inputs["labels"][:, :-1], pad(inputs["labels"], (0, 1)), inputs["labels"].repeat(2, 1)):
        for call in (model, model.log_probability):
            with pytest.raises(ValueError, match="labels has shape .* expected that of input_ids"):
                call(**{**inputs, "labels": labels})


def test_a_sequence_longer_than_the_context_is_refused(processor, model, batch):
    limit = model.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"The prompt has \d+ tokens and a chunk up to 16, more than .* {limit} pos"):
        processor(images=batch["images"][0], text="push it " * limit, state=batch["state"][0])
    inputs = prompts(processor, batch)
    room = limit - inputs["input_ids"].shape[1]
    for padding, refused in ((room - 16, False), (room - 15, True)):
        padded = {name: pad(inputs[name], (padding, 0)) for name in ("input_ids", "attention_mask")}
        if refused:
            with pytest.raises(ValueError, match=f"more than the model's {limit} positions"):
                model.generate(**inputs | padded)
        else:
            model.generate(**inputs | padded, max_new_tokens=1)
    ids = torch.ones((1, limit + 1), dtype=torch.long)
    with pytest.raises(ValueError, match=f"input_ids has {limit + 1} tokens"):
        model(input_ids=ids)


def test_the_loss_comes_first_as_in_transformers(processor, model, batch):
    inputs = processor(**batch)
    outputs = model(**inputs)
    assert next(iter(outputs)) == "loss" and outputs[0] is outputs.loss
    assert torch.equal(model(**inputs, return_dict=False)[0], outputs.loss)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


def test_weights_that_are_not_finite_never_become_actions(processor, model, batch):
    inputs = prompts(processor, batch)
    model.lm_head.weight.data.fill_(float("nan"))
    for options in ({}, {"do_sample": True}, {"num_beams": 2}, {"relaxed": True}, {"max_new_tokens": 2}):
        with pytest.raises(ValueError, match="Look for NaN"):
            model.generate(**inputs, **options)


def test_one_sample_that_is_not_finite_is_refused_after_its_neighbours_end(processor, model, batch):
    """It becomes NaN in the middle of its string."""
    inputs, steps = prompts(processor, batch), []

    def spoil(module, args, logits):
        steps.append(1)
        return logits.index_fill(0, torch.tensor(2), torch.nan) if len(steps) == 3 else logits

    with model.lm_head.register_forward_hook(spoil):
        for options in ({}, {"do_sample": True}):
            steps.clear()
            with pytest.raises(ValueError, match="scores for the action tokens are nan"):
                model.generate(**inputs, **options)
            assert len(steps) > 3


def test_a_model_without_action_tokens_says_how_to_get_them(stock_folder):
    model = SmolAndFastForActionPrediction.from_pretrained(stock_folder)
    with pytest.raises(ValueError, match="processor.model_kwargs"):
        model.generate(**stock_inputs())


def test_fast_plus_drives_the_tiny_model(fast_plus, demonstrations, batch):
    processor = make_tiny_processor(fast_plus, compute_statistics(*demonstrations), TASK, chunk_size=8)
    torch.manual_seed(0)
    model = make_tiny_model(processor, n_action_steps=4).eval()
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        actions = processor.post_process_actions(model.generate(**prompts(processor, batch), **options))
        assert actions.shape == (4, 8, 2)


@pytest.mark.parametrize(
    ("version", "dtype", "warnings"), [("5.19.0", "bfloat16", 1), ("5.19.0", "float32", 0), ("5.24.0", "bfloat16", 0)]
)
def test_a_release_that_misplaces_patches_in_bf16_is_warned_of(model, tmp_path, monkeypatch, version, dtype, warnings):
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_smolandfast.transformers, "__version__", version)
    with warnings_of(modeling_smolandfast) as messages:
        SmolAndFastForActionPrediction.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    assert len([message for message in messages if "rounds the positions" in message]) == warnings
