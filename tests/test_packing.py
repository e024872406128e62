"""Packed bf16 weights: the same policy, faster."""

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bf16 products"
)


@pytest.fixture
def inputs(processor, batch):
    return processor(images=batch["images"], text=batch["text"], state=batch["state"])


def test_packed_weights_are_as_near_to_float32_as_bf16_is(model, inputs):
    exact = model(**inputs).logits
    plain = model.to(torch.bfloat16)(**inputs).logits
    packed = model.pack()(**inputs).logits
    assert packed.dtype == torch.bfloat16
    assert (packed - exact).abs().mean() <= 1.2 * (plain - exact).abs().mean()


def test_a_packed_model_writes_chunks(model, processor, inputs):
    packed = model.to(torch.bfloat16).pack()
    assert not [name for name, module in packed.model.named_modules() if type(module) is torch.nn.Linear]
    for options in ({}, {"do_sample": True}, {"num_beams": 3}):
        assert processor.post_process_actions(packed.generate(**inputs, **options)).shape == (4, 8, 2)


def test_what_packing_cannot_serve_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="torch.float32 on cpu, expected bf16.*dtype=torch.bfloat16"):
        model.pack()
    packed = model.to(torch.bfloat16).pack()
    with pytest.raises(ValueError, match="cannot be saved"):
        packed.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
