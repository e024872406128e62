"""Attention for training in bf16 on a CPU with matrix instructions: PyTorch's forward pass, a faster backward pass.

PyTorch's fused CPU kernel spends most of the backward pass outside of its matrix products. Here the probabilities are
computed anew from the forward pass's log-sum-exp, as in FlashAttention (Dao et al. 2022), but one head at a time, with
five large bf16 products and two passes over the scores: `exp` and a multiplication. What would be further passes
(subtracting the log-sum-exp, subtracting each row's mean gradient) rides along in the products as two more columns.

`training_smolandfast.py` registers it with Transformers as `attn_implementation="bf16_training"`.
"""

import math

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Query rows handled at once where attention is causal: keys after the last of them are left out.
CAUSAL_ROWS = 256
# Probabilities are kept times 32. bf16 has 8 bits, so an exponent near 0 is exact to more digits than one near -7.
LOG_SHIFT = 5 * math.log(2)


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
        batch, heads, num_queries, dim = query.shape
        key_heads, num_keys = key.shape[1:3]
        shared = heads // key_heads  # query heads on one key head: they are handled as so many more rows
        mean_grad = (output * grad_output).sum(-1, dtype=torch.float32) / 32
        # P = exp(scores - log_sum_exp); 32 P comes out of exp, so everything that P is multiplied by is divided by 32.
        rows = (batch, key_heads, shared, num_queries, -1)
        query = _with_bias(query * ctx.scaling, LOG_SHIFT - log_sum_exp).view(rows)
        grad = _with_bias(grad_output / 32, -mean_grad).view(rows)
        key, value = _with_ones(key), _with_ones(value)
        grad_query = query.new_empty(batch, key_heads, shared, num_queries, dim)
        grad_key, grad_value = query.new_zeros(2, batch, key_heads, num_keys, dim)
        step = CAUSAL_ROWS if ctx.is_causal else num_queries
        scratch = query.new_empty(2, num_keys * shared * min(step, num_queries))
        for i in range(batch):
            for j in range(key_heads):
                for start in range(0, num_queries, step):
                    end = min(start + step, num_queries)
                    seen = end if ctx.is_causal else num_keys
                    q, g = query[i, j, :, start:end].flatten(0, 1), grad[i, j, :, start:end].flatten(0, 1)
                    k, v = key[i, j, :seen], value[i, j, :seen]
                    p, ds = scratch[:, : seen * len(q)].view(2, seen, len(q))  # transposed: keys, queries
                    torch.mm(k, q.T, out=p).exp_()
                    if ctx.is_causal:
                        p[start:].view(end - start, shared, end - start).transpose(0, 1).triu_()
                    torch.mm(v, g.T, out=ds).mul_(p)
                    grad_key[i, j, :seen].addmm_(ds, q[:, :dim])
                    grad_value[i, j, :seen].addmm_(p, g[:, :dim])
                    grad_query[i, j, :, start:end] = (ds.T @ k[:, :dim]).view(shared, -1, dim)
        return grad_query.view(batch, heads, num_queries, dim).mul_(ctx.scaling), grad_key, grad_value, None, None


# Eight columns, not two: rows then begin at multiples of 16 bytes.
def _with_bias(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Append columns whose sum is `bias`, in two parts since one bf16 number is too coarse."""
    wide = torch.nn.functional.pad(x, (0, 8))
    wide[..., -8] = bias
    wide[..., -7] = bias - wide[..., -8]
    return wide


def _with_ones(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 8), value=1.0)


@torch.compiler.disable
def _attend(query, key, value, scaling, is_causal):
    return _Attention.apply(query, key, value, scaling, is_causal)


def bf16_training_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs
):
    """Transformers' `sdpa` attention, with the other backward pass where it applies: in bf16 on a CPU, without a mask.

    Args and Returns: those of Transformers' attention functions.
    """
    is_causal = module.is_causal if is_causal is None else is_causal
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    is_bf16_on_cpu = query.device.type == "cpu" and dtype == torch.bfloat16
    is_training = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    is_plain = attention_mask is None and not dropout and (query.shape[2] == key.shape[2] or not is_causal)
    if not (is_bf16_on_cpu and is_training and is_plain):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    output = _attend(query.to(dtype), key.to(dtype), value.to(dtype), scaling or query.shape[-1] ** -0.5, is_causal)
    return output.transpose(1, 2).contiguous(), None
