"""Weights laid out for inference on a CPU, once and for all.

oneDNN multiplies in a layout of its own. PyTorch keeps weights row by row and has them rearranged at every call, which
costs as much as the product itself where few rows are multiplied: in each decoding step. Packed, they are rearranged
once; what follows a product element by element becomes part of it; and a layer is a handful of calls, since in a
decoding step of a small model most of the time passes between them.

PyTorch's compiler does the same, and better: it writes products of its own where oneDNN's are slower, and each tower
becomes one call. But that takes minutes in every process, and a C++ compiler.

Both stand on parts of PyTorch and Transformers that may change with any release. So only `pack()` imports this file, a
packed layer refuses an argument that it does not know, and packing has to prove itself: what differs is put back.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.functional import rms_norm
from transformers import GenerationMixin, SmolVLMForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMEncoder, SmolVLMEncoderLayer
from transformers.utils import logging

logger = logging.get_logger(__name__)

NUM_ROWS = 128  # the layout works for any number of rows; it suits this many the best
UNARY = {"none": ("none", [], ""), "gelu_pytorch_tanh": ("gelu", [], "tanh"), "silu": ("swish", [], "")}
# oneDNN gives all of a product to one thread where the output is much narrower than the input and neither short nor
# long, but not in pieces of so many rows (2 threads, 1024 x 3072 by 3072 x 768: 4.5 ms in one, 2.6 in four pieces).
PIECE_ROWS = 256
GROUP_ROWS = 2048  # patches of as many images as pass through the vision tower together
# Largest mean difference of the scores before and after, in their standard deviations. Rounding to bf16's 8 bits gave
# up to 0.04, at the real size; without its cache the tiny model is 1 off.
TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-3}
# What a library that has changed raises.
CHANGED = (AttributeError, TypeError, LookupError, ValueError, RuntimeError)
COMPILER = {
    "freezing": True,  # weights are constants: they are packed while compiling
    "max_autotune": True,  # products by oneDNN or by the compiler's own code, whichever is faster here
    "max_autotune_gemm_backends": "CPP,ATEN",
    "cpp.enable_concat_linear": True,
    "cpp_wrapper": True,
    "autotune_num_choices_displayed": 0,
    "max_autotune_report_choices_stats": False,
}


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
        out_features, in_features = weight.shape
        self.in_pieces = in_features >= 4 * out_features
        self.register_state_dict_pre_hook(refuse_saving)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if not (self.in_pieces and PIECE_ROWS < rows < 6 * PIECE_ROWS and torch.get_num_threads() > 1):
            return self.product(x, other)
        count = -(-rows // PIECE_ROWS)
        others = [None] * count if other is None else other.flatten(0, -2).chunk(count)
        pieces = [self.product(*piece) for piece in zip(x.flatten(0, -2).chunk(count), others, strict=True)]
        return torch.cat(pieces).view(*x.shape[:-1], -1)

    def product(self, x: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
        if other is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *UNARY[self.then])
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, self.then)


def refuse_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise ValueError("A packed model cannot be saved. Save it before pack(), or load it again.")


class PackedPatches(nn.Module):
    """The convolution that makes a vector of each patch, as one product: patches do not overlap."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.height, self.width = convolution.kernel_size
        linear = nn.Linear(convolution.weight[0].numel(), convolution.out_channels, device="meta")
        linear.weight, linear.bias = nn.Parameter(convolution.weight.flatten(1)), convolution.bias
        self.linear = PackedLinear(linear)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, height, width) -> (batch, hidden_size, rows, columns)` of patches."""
        patches = pixel_values.unflatten(3, (-1, self.width)).unflatten(2, (-1, self.height))
        return self.linear(patches.permute(0, 2, 4, 1, 3, 5).flatten(3)).permute(0, 3, 1, 2)


class MergedLinear(nn.Module):
    """A `PackedLinear` for the compiler, which packs and fuses by itself."""

    def __init__(self, *linears: nn.Linear, then: str = "none"):
        super().__init__()
        self.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]))
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases)) if biases else None
        functions = {"none": nn.Identity(), "add": torch.add, "mul": torch.mul, "gelu_pytorch_tanh": gelu}
        self.then = functions.get(then) or ACT2FN[then]
        self.register_state_dict_pre_hook(refuse_saving)

    def forward(self, x: torch.Tensor, *other: torch.Tensor) -> torch.Tensor:
        return self.then(nn.functional.linear(x, self.weight, self.bias), *other)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The tanh form of GELU, as 0.5 (1 + tanh(u)) = sigmoid(2 u): compiled, an exponential costs less than tanh."""
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


class PackedEncoderLayer(nn.Module):
    """A layer of the vision tower, of linear layers of the given class."""

    is_causal = False

    def __init__(self, layer: SmolVLMEncoderLayer, linear: type[nn.Module]):
        super().__init__()
        attention = layer.self_attn
        self.head_dim, self.scaling = attention.head_dim, attention.scale
        self.layer_norm1, self.layer_norm2 = layer.layer_norm1, layer.layer_norm2
        self.qkv_proj = linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out_proj = linear(attention.out_proj, then="add")
        self.fc1 = linear(layer.mlp.fc1, then=layer.mlp.config.hidden_act)
        self.fc2 = linear(layer.mlp.fc2, then="add")

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        qkv = self.qkv_proj(self.layer_norm1(hidden_states)).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](self, query, key, value, attention_mask, scaling=self.scaling)
        hidden_states = self.out_proj(attended.flatten(-2), hidden_states)
        return self.fc2(self.fc1(self.layer_norm2(hidden_states)), hidden_states)


class PackedEncoder(nn.Module):
    """The vision tower's layers, a few images at a time: what passes between them then stays in fast memory."""

    group_size: int | None = None  # images at a time; None: as many as have GROUP_ROWS patches

    def __init__(self, encoder: SmolVLMEncoder, linear: type[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(PackedEncoderLayer(layer, linear) for layer in encoder.layers)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None) -> BaseModelOutput:
        inputs_embeds = inputs_embeds.contiguous()  # they come channel by channel, and each layer would copy them anew
        count = self.group_size or max(GROUP_ROWS // inputs_embeds.shape[1], 1)
        masks = repeat(None) if attention_mask is None else attention_mask.split(count)
        groups = [self.run(*group) for group in zip(inputs_embeds.split(count), masks, strict=False)]
        return BaseModelOutput(last_hidden_state=torch.cat(groups))

    def run(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        return hidden_states


class PackedDecoderLayer(LlamaDecoderLayer):  # of this class, so that Transformers can record hidden states
    """A layer of the text model, of linear layers of the given class."""

    is_causal = True

    def __init__(self, layer: LlamaDecoderLayer, linear: type[nn.Module]):
        nn.Module.__init__(self)
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx, self.head_dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.num_key_value_groups = attention.num_key_value_groups
        self.num_key_value_heads = attention.config.num_key_value_heads
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv_proj = linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = linear(attention.o_proj, then="add")
        self.gate_proj = linear(mlp.gate_proj, then=mlp.config.hidden_act)
        self.up_proj = linear(mlp.up_proj, then="mul")
        self.down_proj = linear(mlp.down_proj, then="add")

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.run(hidden_states, *known_arguments(**kwargs))

    def run(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        qkv = self.qkv_proj(normalize(hidden_states, self.input_layernorm)).unflatten(-1, (-1, self.head_dim))
        query_key, value = qkv.tensor_split([-self.num_key_value_heads], dim=-2)
        query_key = rotate(query_key, *position_embeddings)
        query, key = query_key.tensor_split([-self.num_key_value_heads], dim=-2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            # In one order whether they are a prompt's or a further token's, since the compiler knows only one.
            key, value = cache.update(key.contiguous(), value.contiguous(), self.layer_idx)
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


class CompiledEncoder(PackedEncoder):
    """The vision tower's layers, compiled for one image at a time."""

    group_size = 1

    def __init__(self, encoder: SmolVLMEncoder):
        super().__init__(encoder, MergedLinear)
        self.run = torch.compile(self.run, dynamic=False, options={"guard_filter_fn": _look_at_one_weight})

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None) -> BaseModelOutput:
        with _compiler_settings():
            return super().forward(inputs_embeds, attention_mask)


class CompiledDecoder(nn.Module):
    """All layers of the text model, compiled for prompts of any length and for further tokens after any number."""

    def __init__(self, layers: nn.ModuleList):
        super().__init__()
        self.layers = nn.ModuleList(PackedDecoderLayer(layer, MergedLinear) for layer in layers)
        self.run = torch.compile(self._run, dynamic=True, options={"guard_filter_fn": _look_at_one_weight})

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        with _compiler_settings():
            return self.run(hidden_states, *known_arguments(**kwargs))

    def _run(self, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer.run(hidden_states, *args)
        return hidden_states


def _look_at_one_weight(guards: Sequence[Any]) -> list[bool]:
    """What PyTorch looks at before each call: of a model, which does not change, only that it is the same one."""
    kept = torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards)
    kept[next(i for i, guard in enumerate(guards) if guard.guard_type == "ID_MATCH" and not kept[i])] = True
    return kept


@contextmanager
def _compiler_settings() -> Iterator[None]:
    # Not options of torch.compile: weights become constants only where the setting is known while tracing.
    tracing = torch._dynamo.config.patch(specialize_float=True, recompile_limit=64)  # of all models in the process
    with torch.no_grad(), torch._inductor.config.patch(COMPILER), tracing:
        yield


def pack(model: SmolVLMForConditionalGeneration, compiled: bool) -> bool:
    """Replace the layers of `model`, in place, if what it then computes is the same but for rounding.

    A prefill and two cached steps on made-up inputs are compared with those before.

    Returns:
        Whether they are replaced; if not, the model is as it was, and a warning says why.

    Raises:
        ValueError: No C++ compiler to compile with.
    """
    if compiled:
        check_compiler("pack(compiled=True)")
    dtype, stock = model.dtype, []
    sizes = _sizes(model, compiled)
    try:
        before = [scores for size in sizes for scores in _try_out(model, *size)]
        if compiled:
            compile_towers(model.model, stock)
        if dtype == torch.bfloat16:
            pack_layers(model.model, stock)
        after = [scores for size in sizes for scores in _try_out(model, *size)]
        differences = [(y - x).abs().mean() / x.std() for x, y in zip(before, after, strict=True)]
        difference = torch.stack(differences).max().item()
        if difference <= TOLERANCE[dtype]:  # NaN is not
            return True
        reason = f"the scores differ by {difference:.2g} standard deviations, rounding by {TOLERANCE[dtype]} at most"
    except CHANGED as error:
        reason = f"{type(error).__name__}: {error}"
    for parent, name, layer in reversed(stock):
        setattr(parent, name, layer)
    logger.warning(
        f"pack() left the model as it was, only slower: {reason}. This is torch {torch.__version__} with transformers "
        f"{transformers.__version__}; releases that it works with are in pyproject.toml."
    )
    return False


def _sizes(model: nn.Module, compiled: bool) -> list[tuple[int, int]]:
    """Prompts and pixels a side to try: one prompt, and two of unequal length; for the compiler what it will meet."""
    vision = model.config.vision_config
    whole = model.config.image_size or vision.image_size
    small = min(2 * vision.patch_size * model.config.scale_factor, whole)
    return [(1, whole)] if compiled else [(1, small), (2, small)]


def _try_out(model: SmolVLMForConditionalGeneration, batch_size: int, image_size: int) -> tuple[torch.Tensor, ...]:
    """Scores of a prefill and two cached steps, each `(batch_size, vocab_size)`, for images of noise and any words."""
    config, side = model.config, image_size // model.config.vision_config.patch_size // model.config.scale_factor
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
    """Replace the layers of both towers below `model`, every other linear layer, and the patches' convolution.

    Args:
        stock: Gets each layer that was replaced, behind the module it was in and its name.
    """
    for name, child in list(model.named_children()):
        if isinstance(child, SmolVLMEncoder):
            packed = PackedEncoder(child, PackedLinear)
        elif type(child) is LlamaDecoderLayer:
            packed = PackedDecoderLayer(child, PackedLinear)
        elif type(child) is nn.Linear:
            packed = PackedLinear(child)
        elif type(child) is nn.Conv2d:
            packed = PackedPatches(child)
        else:
            pack_layers(child, stock)
            continue
        stock.append((model, name, child))
        setattr(model, name, packed)


def check_compiler(caller: str) -> None:
    """Raises ValueError where there is no C++ compiler, which PyTorch would say in the middle of the first call."""
    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except torch._inductor.exc.InvalidCxxCompiler as error:
        raise ValueError(f"{caller} found no C++ compiler. Install g++, or name one in CXX.") from error


def compile_towers(model: nn.Module, stock: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """Replace the layers of both towers by compiled ones; `stock` gets what was there, as from [`pack_layers`]."""
    vision, text = model.vision_model, model.text_model
    compiled = CompiledEncoder(vision.encoder), nn.ModuleList([CompiledDecoder(text.layers)])
    for parent, name, layer in ((vision, "encoder", compiled[0]), (text, "layers", compiled[1])):
        stock.append((parent, name, getattr(parent, name)))
        setattr(parent, name, layer)
