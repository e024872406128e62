"""Attention for training in bf16 on a CPU with matrix instructions: PyTorch's forward pass, a faster backward pass.

PyTorch's fused CPU kernel spends most of the backward pass outside of its matrix products. Here the probabilities are
computed anew from the forward pass's log-sum-exp, as in FlashAttention (Dao et al. 2022), but a few heads at a time,
with five large bf16 products and two passes over the scores: `exp` and a multiplication. What would be further passes
(subtracting the log-sum-exp, subtracting each row's mean gradient) is part of the products, as two more columns.

Importing this file registers it with Transformers as `attn_implementation="bf16_training"`. What it cannot do, and a
PyTorch without the forward kernel, is left to the stock `sdpa`. `benchmarks/bench_training_256m.py` measures what it
brings.
"""

import math

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Query rows handled at once where attention is causal: keys after the last of them are left out.
CAUSAL_ROWS = 256
# Scores handled at once, of as many heads as they suffice for. More do not fit the processor's fast memory.
NUM_SCORES = 4 * 1024 * 1024
# Probabilities are kept times 32. bf16 has 8 bits, so an exponent near 0 is exact to more digits than one near -7.
LOG_SHIFT = 5 * math.log(2)
# Arguments that Transformers passes to every attention function and that mean nothing without a mask.
UNUSED = ("position_ids", "use_cache", "output_hidden_states")


class _Attention(torch.autograd.Function):
    """`(batch, heads, queries, head_dim)`, keys and values with as many heads or a divisor of them."""

    @staticmethod
    def forward(ctx, query, key, value, scaling, is_causal):
        output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, scale=scaling
        )
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.scaling, ctx.is_causal = scaling, is_causal
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        batch, key_heads, num_keys, dim = key.shape
        num_queries = query.shape[2]
        shared = query.shape[1] // key_heads  # query heads on one key head: they are handled as so many more rows
        mean_grad = (output * grad_output).float().sum(-1)
        # P = exp(scores - log_sum_exp); 32 P comes out of exp, so everything that P is multiplied by is divided by 32.
        query = _with_bias(query, ctx.scaling, LOG_SHIFT - log_sum_exp, key_heads)
        grad = _with_bias(grad_output, 1 / 32, mean_grad / -32, key_heads)
        wide_key, wide_value = _with_ones(key), _with_ones(value)
        key = wide_key[..., :dim].contiguous()
        grad_query = query.new_empty(*query.shape[:2], dim)
        grad_key, grad_value = key.new_empty(2, *key.shape)
        step = min(CAUSAL_ROWS, num_queries) if ctx.is_causal else num_queries
        if ctx.is_causal:  # what is added to the scores of each key for the queries before it
            hidden = torch.full((step, step), -torch.inf, dtype=key.dtype).tril(-1).repeat_interleave(shared, dim=1)
        count = max(NUM_SCORES // (num_keys * step * shared), 1)
        scratch = key.new_empty(2, count * num_keys * step * shared)
        for i in range(0, len(key), count):
            heads = slice(i, i + count)
            k, dk, dv = key[heads], grad_key[heads], grad_value[heads]
            for start in reversed(range(0, num_queries, step)):  # all keys take part in the first: it needs no zeros
                end = min(start + step, num_queries)
                seen = end if ctx.is_causal else num_keys
                part = slice(start * shared, end * shared)
                q, g = query[heads, part], grad[heads, part]
                size = (len(k), seen, q.shape[1])  # transposed: keys, queries
                p, ds = (x[: math.prod(size)].view(size) for x in scratch)
                torch.bmm(wide_key[heads, :seen], q.mT, out=p)
                if ctx.is_causal:
                    p[:, start:] += hidden[: end - start, : size[2]]
                p.exp_()
                torch.bmm(wide_value[heads, :seen], g.mT, out=ds).mul_(p)
                beta = 0 if seen == num_keys else 1
                dk[:, :seen].baddbmm_(ds, q[..., :dim], beta=beta)
                dv[:, :seen].baddbmm_(p, g[..., :dim], beta=beta)
                grad_query[heads, part].baddbmm_(ds.mT, k[:, :seen], beta=0, alpha=ctx.scaling)
        grad_query = grad_query.view(batch, key_heads, num_queries, shared, dim)
        grads = (x.view(batch, key_heads, num_keys, dim) for x in (grad_key, grad_value))
        return grad_query.transpose(2, 3).flatten(1, 2), *grads, None, None


# Eight columns, not two: rows then begin at multiples of 16 bytes.
def _with_bias(x: torch.Tensor, factor: float, bias: torch.Tensor, key_heads: int) -> torch.Tensor:
    """`factor * x` with columns whose sum is `bias`, in two parts since one bf16 number is too coarse.

    Args:
        x, bias: `(batch, heads, queries, dim)` and `(batch, heads, queries)`.

    Returns:
        `(batch * key_heads, queries * heads / key_heads, dim + 8)`.
    """
    x, bias = x.unflatten(1, (key_heads, -1)), bias.unflatten(1, (key_heads, -1))
    batch, _, shared, num_queries, dim = x.shape
    rows = x.new_empty(batch, key_heads, num_queries, shared, dim + 8)
    wide = rows.transpose(2, 3)
    torch.mul(x, factor, out=wide[..., :dim])
    wide[..., dim:] = 0
    wide[..., dim] = bias
    wide[..., dim + 1] = bias - wide[..., dim]
    return rows.view(batch * key_heads, num_queries * shared, dim + 8)


def _with_ones(x: torch.Tensor) -> torch.Tensor:
    wide = x.new_empty(*x.shape[:-1], x.shape[-1] + 8)
    wide[..., : x.shape[-1]] = x
    wide[..., x.shape[-1] :] = 1
    return wide.flatten(0, 1)


@torch.compiler.disable
def _attend(query, key, value, scaling, is_causal):
    return _Attention.apply(query, key, value, scaling, is_causal)


def bf16_training_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs
):
    """Transformers' `sdpa` attention, with the other backward pass where it applies: in bf16 on a CPU, without a mask.

    Everything else is left to `sdpa`: an unknown argument too, and a PyTorch without the kernel.

    Args and Returns: those of Transformers' attention functions.
    """
    is_causal = module.is_causal if is_causal is None else is_causal
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    is_bf16_on_cpu = query.device.type == "cpu" and dtype == torch.bfloat16
    is_training = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    is_plain = attention_mask is None and not dropout and (query.shape[2] == key.shape[2] or not is_causal)
    is_known = all(value is None for name, value in kwargs.items() if name not in UNUSED)
    has_kernel = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    if not (is_bf16_on_cpu and is_training and is_plain and is_known and has_kernel):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    output = _attend(query.to(dtype), key.to(dtype), value.to(dtype), scaling or query.shape[-1] ** -0.5, is_causal)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("bf16_training", bf16_training_attention)
AttentionMaskInterface.register("bf16_training", sdpa_mask)
