"""Packed bf16 weights: the same policy, faster."""

import pytest
import torch

from smolandfast import packing_smolandfast
from smolandfast.packing_smolandfast import PackedLinear

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bf16 products"
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


def test_long_inputs_in_pieces_and_many_images_in_groups_give_the_same(model, inputs, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    linear = PackedLinear(torch.nn.Linear(64, 16).to(torch.bfloat16), then="add")
    x, other = torch.randn(3, 200, 64).to(torch.bfloat16), torch.randn(3, 200, 16).to(torch.bfloat16)
    torch.testing.assert_close(linear(x, other), linear.product(x, other))
    packed = model.to(torch.bfloat16).pack()
    together = packed(**inputs).logits
    monkeypatch.setattr(packing_smolandfast, "GROUP_ROWS", 1)
    torch.testing.assert_close(packed(**inputs).logits, together)


def test_what_packing_cannot_serve_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="torch.float32 on cpu, expected bf16.*dtype=torch.bfloat16"):
        model.pack()
    packed = model.to(torch.bfloat16).pack()
    with pytest.raises(ValueError, match="cannot be saved"):
        packed.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
