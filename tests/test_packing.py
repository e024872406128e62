"""Packed weights: the same policy, faster."""

import re
import sys

import pytest
import torch
from conftest import warnings_of

from smolandfast import modeling_smolandfast, packing_smolandfast
from smolandfast.packing_smolandfast import PackedDecoderLayer

pytestmark = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512"), reason="this processor has no bf16 products"
)


@pytest.fixture
def inputs(processor, batch):
    return processor(images=batch["images"], text=batch["text"], state=batch["state"])


def test_packed_weights_are_as_near_to_float32_as_bf16_is(model, inputs):
    exact = model(**inputs).logits
    plain = model.to(torch.bfloat16)(**inputs).logits
    output = model.pack()(**inputs, output_hidden_states=True)
    packed = output.logits
    assert packed.dtype == torch.bfloat16
    assert len(output.hidden_states) == model.config.text_config.num_hidden_layers + 1
    assert (packed - exact).abs().mean() <= 1.2 * (plain - exact).abs().mean()


def test_a_packed_model_writes_chunks(model, processor, inputs):
    packed = model.to(torch.bfloat16).pack()
    assert not [name for name, module in packed.model.named_modules() if type(module) is torch.nn.Linear]
    for options in ({}, {"do_sample": True}, {"num_beams": 3}):
        assert processor.post_process_actions(packed.generate(**inputs, **options)).shape == (4, 8, 2)


def test_writing_a_chunk_with_a_cache_is_writing_it_in_one_pass(model, inputs):
    packed = model.to(torch.bfloat16).pack()
    output = packed.generate(**inputs, return_dict_in_generate=True, output_logits=True)
    written = output.sequences[:, inputs["input_ids"].shape[1] :]
    ids = torch.cat([inputs["input_ids"], written], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(written)], dim=1)
    images = {name: value for name, value in inputs.items() if name.startswith("pixel")}
    at_once = packed(input_ids=ids, attention_mask=mask, **images).logits[:, -written.shape[1] - 1 : -1]
    for step, logits in enumerate(output.logits):
        torch.testing.assert_close(logits.float(), at_once[:, step].float(), rtol=0.05, atol=0.05)


def test_a_packed_model_is_neither_saved_nor_trained_nor_packed_again(model, inputs, tmp_path):
    packed = model.to(torch.bfloat16).pack()
    with pytest.raises(ValueError, match="cannot be saved"):
        packed.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(ValueError, match="packed or quantized already"):
        packed.pack()
    with pytest.raises(ValueError, match="cannot be trained"):
        packed.train()(**inputs)


def test_weights_in_another_type_are_refused(model):
    with pytest.raises(ValueError, match="torch.float32 on cpu, expected bf16.*dtype=torch.bfloat16"):
        model.pack()


class LosesItsCache(PackedDecoderLayer):
    """What a release does that names an argument otherwise, where unknown arguments are ignored."""

    def forward(self, hidden_states, cache=None, past_key_values=None, **kwargs):
        return super().forward(hidden_states, **kwargs)


class LosesItsMask(PackedDecoderLayer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return super().forward(hidden_states, **kwargs)


class GetsWhatItDoesNotKnow(PackedDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, sliding_window=4, **kwargs)


def renamed(*args, **kwargs):
    raise AttributeError("'LlamaAttention' object has no attribute 'q_proj'")


@pytest.mark.parametrize(
    "layer, reason",
    [
        (LosesItsCache, r"scores differ by [0-9.]+ standard deviations, rounding by 0.1 at most"),
        (LosesItsMask, r"scores differ by [0-9.]+ standard deviations"),
        (GetsWhatItDoesNotKnow, "sliding_window, which it does not know"),
        (renamed, "no attribute 'q_proj'"),
    ],
)
def test_a_model_that_packing_would_change_stays_as_it_is(layer, reason, model, inputs, monkeypatch):
    model.to(torch.bfloat16)
    layers, written = list(model.modules()), model.generate(**inputs)
    monkeypatch.setattr(packing_smolandfast, "PackedDecoderLayer", layer)
    with warnings_of(packing_smolandfast) as messages:
        assert model.pack() is model and not model.is_packed
    assert len(messages) == 1 and re.search(reason, messages[0]) and torch.__version__ in messages[0]
    assert [id(module) for module in model.modules()] == [id(module) for module in layers]
    assert torch.equal(model.generate(**inputs), written)


def test_a_release_without_what_packing_imports_leaves_the_model_as_it_is(model, monkeypatch):
    monkeypatch.setitem(sys.modules, packing_smolandfast.__name__, None)
    with warnings_of(modeling_smolandfast) as messages:
        assert not model.to(torch.bfloat16).pack().is_packed
    assert "lacks what it needs" in messages[0]


def test_a_packed_layer_refuses_an_argument_that_it_does_not_know(model, inputs):
    packed = model.to(torch.bfloat16).pack()
    layer = packed.model.text_model.layers[0]
    hidden = torch.randn(1, 3, packed.config.text_config.hidden_size).to(torch.bfloat16)
    rotary = [torch.ones(1, 3, packed.config.text_config.head_dim).to(torch.bfloat16)] * 2
    layer(hidden, position_embeddings=rotary, position_ids=torch.arange(3)[None], renamed_cache=None)
    with pytest.raises(ValueError, match="got renamed_cache, which it does not know"):
        layer(hidden, position_embeddings=rotary, renamed_cache=object())
    with pytest.raises(ValueError, match="output_attentions"):
        packed(**inputs, output_attentions=True)
