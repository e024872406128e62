"""Weights laid out for inference on a CPU, once and for all.

oneDNN multiplies in a layout of its own. PyTorch keeps weights row by row and has them rearranged at every call, which
costs as much as the product itself where few rows are multiplied: in each decoding step. Packed, they are rearranged
once; what follows a product element by element becomes part of it; and a layer is a handful of calls, since in a
decoding step of a small model most of the time passes between them.

This stands on parts of PyTorch and Transformers that may change with any release. So only the model's `pack()` imports
this file, a packed layer refuses an argument that it does not know, and packing has to prove itself: what differs is
put back.
"""

from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.functional import rms_norm
from transformers import GenerationMixin, SmolVLMForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMEncoderLayer
from transformers.utils import logging

logger = logging.get_logger(__name__)

NUM_ROWS = 128  # the layout works for any number of rows; it suits this many the best
UNARY = {"none": ("none", [], ""), "gelu_pytorch_tanh": ("gelu", [], "tanh"), "silu": ("swish", [], "")}
# Largest mean difference of the scores before and after, in their standard deviations. Rounding to bf16's 8 bits gave
# up to 0.04, at the real size; without its cache the tiny model is 1 off.
TOLERANCE = 0.1
# What is raised when internals of PyTorch or Transformers have changed.
CHANGED = (AttributeError, TypeError, LookupError, ValueError, RuntimeError)


class PackedLinear(nn.Module):
    """A linear layer that can neither be trained nor saved.

    Args:
        linears: bf16 layers of one input, whose outputs are put side by side.
        then: What follows: "none", "gelu_pytorch_tanh" or "silu"; or "add" or "mul", with the second argument of
            `forward`.
    """

    def __init__(self, *linears: nn.Linear, then: str = "none"):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, NUM_ROWS)
        self.bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
        self.then = then
        self.register_state_dict_pre_hook(refuse_saving)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        if other is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *UNARY[self.then])
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, self.then)


def refuse_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise ValueError("A packed model cannot be saved. Save it before pack(), or load it again.")


class PackedEncoderLayer(nn.Module):
    """A layer of the vision tower."""

    is_causal = False

    def __init__(self, layer: SmolVLMEncoderLayer):
        super().__init__()
        attention = layer.self_attn
        self.head_dim, self.scaling = attention.head_dim, attention.scale
        self.layer_norm1, self.layer_norm2 = layer.layer_norm1, layer.layer_norm2
        self.qkv_proj = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out_proj = PackedLinear(attention.out_proj, then="add")
        self.fc1 = PackedLinear(layer.mlp.fc1, then=layer.mlp.config.hidden_act)
        self.fc2 = PackedLinear(layer.mlp.fc2, then="add")

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        qkv = self.qkv_proj(self.layer_norm1(hidden_states)).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](self, query, key, value, attention_mask, scaling=self.scaling)
        hidden_states = self.out_proj(attended.flatten(-2), hidden_states)
        return self.fc2(self.fc1(self.layer_norm2(hidden_states)), hidden_states)


class PackedDecoderLayer(LlamaDecoderLayer):  # of this class, so that Transformers can record hidden states
    """A layer of the text model."""

    is_causal = True

    def __init__(self, layer: LlamaDecoderLayer):
        nn.Module.__init__(self)
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx, self.head_dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.num_key_value_groups = attention.num_key_value_groups
        self.num_key_value_heads = attention.config.num_key_value_heads
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv_proj = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = PackedLinear(attention.o_proj, then="add")
        self.gate_proj = PackedLinear(mlp.gate_proj, then=mlp.config.hidden_act)
        self.up_proj = PackedLinear(mlp.up_proj, then="mul")
        self.down_proj = PackedLinear(mlp.down_proj, then="add")

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attention_mask, cache, (cos, sin) = known_arguments(**kwargs)
        qkv = self.qkv_proj(normalize(hidden_states, self.input_layernorm)).unflatten(-1, (-1, self.head_dim))
        query_key, value = qkv.tensor_split([-self.num_key_value_heads], dim=-2)
        query, key = rotate(query_key, cos, sin).tensor_split([-self.num_key_value_heads], dim=-2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attended, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](self, query, key, value, attention_mask, scaling=self.scaling)
        hidden_states = self.o_proj(attended.flatten(-2), hidden_states)
        normalized = normalize(hidden_states, self.post_attention_layernorm)
        return self.down_proj(self.up_proj(normalized, self.gate_proj(normalized)), hidden_states)


def known_arguments(
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    cache: Any = None,
    position_ids: torch.Tensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
    output_attentions: bool | None = None,
    **unknown: Any,
) -> tuple[torch.Tensor | None, Any, tuple[torch.Tensor, torch.Tensor]]:
    """What of a decoder layer's arguments counts here: the mask, the cache, the rotary embeddings.

    Transformers 5.24 calls the cache `cache`, earlier releases `past_key_values`. The positions are in the embeddings,
    and hidden states are recorded outside of the layer.

    Raises:
        ValueError: An argument that is not known here, or attention weights, which the fused attention does not give.
    """
    given = [name for name, value in unknown.items() if value is not None]
    if given or output_attentions:
        raise ValueError(
            f"A packed layer got {', '.join(given) or 'output_attentions'}, which it does not know. Drop it, or load "
            "the model without pack()."
        )
    return attention_mask, past_key_values if cache is None else cache, position_embeddings


def normalize(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embeddings of x (B, L, heads, head_dim); cos and sin (B, L, head_dim) repeat in both halves."""
    half = x.shape[-1] // 2
    sin = sin[..., None, :half]
    rotated = x * cos.unsqueeze(-2)
    rotated[..., :half].addcmul_(x[..., half:], sin, value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sin)
    return rotated


def pack(model: SmolVLMForConditionalGeneration) -> bool:
    """Replace the layers of a bf16 `model`, in place, if what it then computes is the same but for rounding.

    A prefill and two cached steps on made-up inputs, one prompt and two of unequal length, are compared with those
    before.

    Returns:
        Whether they are replaced; if not, the model is as it was, and a warning says why.
    """
    stock: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        before = [*_try_out(model, 1), *_try_out(model, 2)]
        pack_layers(model.model, stock)
        after = [*_try_out(model, 1), *_try_out(model, 2)]
        differences = [(y - x).abs().mean() / x.std() for x, y in zip(before, after, strict=True)]
        difference = torch.stack(differences).max().item()
        if difference <= TOLERANCE:  # NaN is not
            return True
        reason = f"the scores differ by {difference:.2g} standard deviations, rounding by {TOLERANCE} at most"
    except CHANGED as error:
        reason = f"{type(error).__name__}: {error}"
    for parent, name, layer in reversed(stock):
        setattr(parent, name, layer)
    logger.warning(
        f"pack() left the model as it was, only slower: {reason}. This is torch {torch.__version__} with transformers "
        f"{transformers.__version__}; releases that it works with are in pyproject.toml."
    )
    return False


def _try_out(model: SmolVLMForConditionalGeneration, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Scores of a prefill and two cached steps, each `(batch_size, vocab_size)`, for small images of noise."""
    config = model.config
    side = min(2, int(config.image_seq_len**0.5))  # visual tokens
    image_size = side * config.scale_factor * config.vision_config.patch_size
    special = {getattr(config.text_config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    special.add(config.image_token_id)
    words = torch.tensor([i for i in range(config.text_config.vocab_size) if i not in special][:32])
    generator = torch.Generator().manual_seed(0)
    visual = torch.full((batch_size, side**2), config.image_token_id)
    text = words[torch.randint(len(words), (batch_size, 16), generator=generator)]
    input_ids = torch.cat([text[:, :8], visual, text[:, 8:]], dim=1)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1:, :3] = 0  # padding on the left
    pixels = torch.rand(batch_size, 1, 3, image_size, image_size, generator=generator) * 2 - 1
    output = GenerationMixin.generate(
        model,
        input_ids=input_ids,
        attention_mask=attention_mask,
        pixel_values=pixels.to(model.dtype),
        prefix_allowed_tokens_fn=lambda *_: words[:1].tolist(),  # the same words, whatever the scores
        max_new_tokens=3,
        do_sample=False,
        num_beams=1,
        pad_token_id=words[0].item(),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return tuple(step.float() for step in output.logits)


def pack_layers(model: nn.Module, stock: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """Replace the layers of both towers below `model`, and every other linear layer.

    Args:
        stock: Gets each layer that was replaced, behind the module it was in and its name.
    """
    packed = {SmolVLMEncoderLayer: PackedEncoderLayer, LlamaDecoderLayer: PackedDecoderLayer, nn.Linear: PackedLinear}
    for name, child in list(model.named_children()):
        if type(child) not in packed:
            pack_layers(child, stock)
            continue
        stock.append((model, name, child))
        setattr(model, name, packed[type(child)](child))
