"""bf16 weights laid out for inference on a CPU, once and for all.

oneDNN multiplies in a layout of its own. PyTorch keeps weights row by row and has them rearranged at every call, which
costs as much as the product itself where few rows are multiplied: in each decoding step. Packed, they are rearranged
once, and the vision tower's GELU, slow in bf16 by itself, becomes part of the product before it.
"""

import torch
from torch import nn
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionMLP

NUM_ROWS = 128  # the layout works for any number of rows; it suits this many the best


class PackedLinear(nn.Module):
    """A linear layer that can neither be trained nor saved.

    Args:
        linear: The bf16 layer to take the weights of.
        with_gelu: Whether GELU (its tanh form) follows.
    """

    def __init__(self, linear: nn.Linear, with_gelu: bool = False):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), NUM_ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.then = ("gelu", [], "tanh") if with_gelu else ("none", [], "")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.then)

    def _save_to_state_dict(self, *args, **kwargs):
        raise ValueError("A packed model cannot be saved. Save it before pack(), or load it again.")


def pack_linears(model: nn.Module) -> None:
    """Replace every linear layer below `model`; in the vision tower the GELU becomes part of the layer before it."""
    for parent in list(model.modules()):
        has_gelu = isinstance(parent, SmolVLMVisionMLP) and parent.config.hidden_act == "gelu_pytorch_tanh"
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child, has_gelu and name == "fc1"))
        if has_gelu:
            parent.activation_fn = nn.Identity()
