"""Training in bf16 on a CPU: the attention's backward pass, alone and in a whole model."""

from unittest.mock import Mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from smolandfast.training import attention, bf16_training_attention


class Attention(torch.nn.Module):
    """What an attention function asks of the module that calls it."""

    def __init__(self, is_causal, groups):
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, groups


def gradients(attend, inputs, grad_output):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    attend(*leaves).backward(grad_output.to(leaves[0].dtype))
    return [leaf.grad.float() for leaf in leaves]


# The vision tower's shape, in one group of heads and in several; the text model's, with and without a short block.
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    ("is_causal", "heads", "key_heads", "length"),
    [
        (False, 12, 12, 100),
        (False, 12, 12, 700),
        (True, 9, 3, 255),
        (True, 9, 3, 256),
        (True, 9, 3, 257),
        (True, 2, 1, 600),
    ],
)
def test_the_backward_pass_is_fp32s_within_what_bf16_resolves(is_causal, heads, key_heads, length, scale):
    torch.manual_seed(0)
    shapes = [(2, h, length, 64) for h in (heads, key_heads, key_heads)]
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]
    inputs[0] *= scale
    inputs[1] *= scale
    grad_output = torch.randn(shapes[0]).bfloat16()

    def reference(query, key, value):
        return scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, enable_gqa=heads != key_heads, scale=0.125
        )

    def ours(query, key, value):
        module = Attention(is_causal, heads // key_heads)
        return bf16_training_attention(module, query, key, value, None, scaling=0.125)[0].transpose(1, 2)

    torch.testing.assert_close(ours(*inputs), reference(*inputs))  # without gradients: `sdpa` itself
    expected = gradients(reference, [x.float() for x in inputs], grad_output.float())
    for found, exact in zip(gradients(ours, inputs, grad_output), expected, strict=True):
        assert (
            found - exact
        ).norm() / exact.norm() < 0.012  # bf16 resolves 0.004; PyTorch's own bf16 kernel has 0.003 to 0.006 here


def test_an_unknown_argument_takes_the_stock_path(monkeypatch):
    stock = Mock(return_value=(None, None))
    monkeypatch.setattr(attention, "sdpa_attention_forward", stock)
    query = torch.randn(1, 2, 8, 16).bfloat16().requires_grad_()
    module = Attention(True, 1)
    bf16_training_attention(module, query, query, query, None, position_ids=torch.arange(8), sliding_window=None)
    assert not stock.called
    bf16_training_attention(module, query, query, query, None, sliding_window=4)
    assert stock.call_args.kwargs["sliding_window"] == 4


def with_gradients(model, inputs, implementation):
    model.set_attn_implementation(implementation)
    model.train().zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.float() for name, p in model.named_parameters()}


def test_a_model_in_training_takes_the_fast_path(processor, model, batch, monkeypatch):
    stock = Mock()
    monkeypatch.setattr(attention, "sdpa_attention_forward", stock)
    with_gradients(model.to(torch.bfloat16), processor(**batch), "bf16_training")
    assert not stock.called


def test_in_fp32_nothing_changes(processor, model, batch):
    inputs = processor(**batch)
    (loss, expected), (same_loss, found) = (with_gradients(model, inputs, a) for a in ("sdpa", "bf16_training"))
    assert torch.equal(same_loss, loss)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_batch_padded_on_the_left_keeps_its_mask(processor, model, batch):
    inputs = processor(**batch)
    inputs["attention_mask"][0, :3] = 0
    model.to(torch.bfloat16)
    (loss, expected), (same_loss, found) = (with_gradients(model, inputs, a) for a in ("sdpa", "bf16_training"))
    torch.testing.assert_close(same_loss, loss)
    name = "model.text_model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=0.02 * expected[name].abs().max().item())


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_a_model_in_bf16_has_fp32s_gradients_roughly(processor, model, batch, autocast):
    inputs = processor(**batch)
    loss, expected = with_gradients(model, inputs, "sdpa")
    if not autocast:
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        bf16_loss, found = with_gradients(model, inputs, "bf16_training")
    assert abs(bf16_loss - loss) < 0.02 * loss
    expected, found = (torch.cat([g.flatten() for g in grads.values()]) for grads in (expected, found))
    assert torch.cosine_similarity(expected, found, dim=0) > 0.99
