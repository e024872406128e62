"""Training in bf16: the attention's backward pass, AdamW with fp32 master weights, and both in a whole model."""

import platform
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from smolandfast import attention_smolandfast, training_smolandfast
from smolandfast.attention_smolandfast import bf16_training_attention
from smolandfast.training_smolandfast import MasterWeightsAdamW, make_optimizer


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
    monkeypatch.setattr(attention_smolandfast, "sdpa_attention_forward", stock)
    query = torch.randn(1, 2, 8, 16).bfloat16().requires_grad_()
    module = Attention(True, 1)
    bf16_training_attention(module, query, query, query, None, position_ids=torch.arange(8), sliding_window=None)
    assert not stock.called
    bf16_training_attention(module, query, query, query, None, sliding_window=4)
    assert stock.call_args.kwargs["sliding_window"] == 4


def with_gradients(model, inputs, attention):
    model.set_attn_implementation(attention)
    model.train().zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.float() for name, p in model.named_parameters()}


def test_a_model_in_training_takes_the_fast_path(processor, model, batch, monkeypatch):
    stock = Mock()
    monkeypatch.setattr(attention_smolandfast, "sdpa_attention_forward", stock)
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


@pytest.mark.parametrize("elements", [2**18, 90, 1], ids=["at once", "a few rows at once", "row by row"])
def test_master_weights_are_those_of_adamw_in_fp32(elements, monkeypatch):
    monkeypatch.setattr(training_smolandfast, "NUM_ELEMENTS", elements)
    torch.manual_seed(0)
    start = torch.randn(40, 30).bfloat16()
    rounded, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    options = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ours, reference = MasterWeightsAdamW([rounded], **options), torch.optim.AdamW([exact], fused=True, **options)
    for _ in range(50):  # each step far below bf16's resolution
        rounded.grad = torch.randn(40, 30).bfloat16()
        exact.grad = rounded.grad.float()
        ours.step()
        reference.step()
    assert torch.equal(ours.state[rounded]["master"], exact)
    assert torch.equal(rounded, exact.bfloat16()) and not torch.equal(rounded, start)


def test_a_saved_optimizer_goes_on_with_its_fp32_values():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5, 4).bfloat16()) for _ in range(2)]
    optimizer = MasterWeightsAdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    again = MasterWeightsAdamW(parameters)
    again.load_state_dict(optimizer.state_dict())
    for parameter in parameters:
        for name, value in optimizer.state[parameter].items():
            assert again.state[parameter][name].dtype == torch.float32
            assert torch.equal(again.state[parameter][name], value)


def test_make_optimizer_keeps_master_weights_for_a_model_in_bf16_only(model):
    assert isinstance(make_optimizer(model), torch.optim.AdamW)
    assert isinstance(make_optimizer(model.to(torch.bfloat16)), MasterWeightsAdamW)


FAULTS = """
import resource, sys, torch
from smolandfast.training_smolandfast import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory(), end=" ")
for _ in range(10):  # until a piece that was freed fits
    torch.zeros(2**24)  # 64 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone can be told")
def test_freed_memory_is_kept_for_the_next_tensors():
    default, kept = (
        subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True).stdout.split()
        for way in ("default", "keep")
    )
    assert int(default[0]) > 3 * 2**26 / 2**12 / 2  # pages; fewer where they are large
    assert kept[0] == "True" and int(kept[1]) < 100
