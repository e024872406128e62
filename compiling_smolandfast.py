"""Compiled layers for training: PyTorch's compiler, told of two things that make a step in bf16 on a CPU faster."""

import torch
from torch.fx import Graph, Node
from transformers.utils import logging

from .modeling_smolandfast import SmolAndFastForActionPrediction
from .packing_smolandfast import check_compiler

try:
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    from torch._inductor.inductor_prims import force_stride_order
except ImportError:  # another release of PyTorch: `compile_layers` then goes without the pass
    CustomGraphPass = None

logger = logging.get_logger(__name__)
aten = torch.ops.aten


def compile_layers(model: SmolAndFastForActionPrediction) -> None:
    """Have PyTorch compile each layer of both towers, in place, when it is first called.

    Where this PyTorch's compiler takes other options, they are left out, with a warning.

    Raises:
        ValueError: A model on a CPU, and no C++ compiler.
    """
    if model.device.type == "cpu":
        check_compiler("compile_layers()")
    layers = [*model.model.vision_model.encoder.layers, *model.model.text_model.layers]
    try:
        if CustomGraphPass is None:
            raise RuntimeError("no CustomGraphPass")
        options = {
            "cpp.use_decompose_tanh": True,  # GELU's tanh by exp, which takes half as long
            "post_grad_custom_post_pass": _TransposedGradients(),
        }
        for layer in layers:
            layer.compile(options=options)
    except RuntimeError as error:
        logger.warning(f"compile_layers() leaves out its options, with which layers are faster: {error}.")
        for layer in layers:
            layer.compile()


class _TransposedGradients(CustomGraphPass or object):
    """Gradients of weights, `x.T @ y`, with what is to be transposed written down so beforehand.

    oneDNN's bf16 products take 1.5 times as long where their first matrix is transposed (768 x 8192 by 8192 x 3072: 32
    ms, or 21 and 2 for writing down the smaller matrix). Square products do not gain.
    """

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))

    def __call__(self, graph: Graph) -> None:
        transposed: dict[Node, Node] = {}
        for product in graph.find_nodes(op="call_function", target=aten.mm.default):
            left, right = product.args
            if left.target is not aten.permute.default:
                continue
            left = left.args[0]  # the product is left.T @ right
            (length, rows), columns = left.meta["val"].shape, right.meta["val"].shape[1]
            is_bf16_on_cpu = left.meta["val"].dtype == torch.bfloat16 and left.meta["val"].device.type == "cpu"
            # A length that varies from call to call is not a number here.
            if not is_bf16_on_cpu or not isinstance(length, int) or max(rows, columns) < 2 * min(rows, columns):
                continue
            small, large = (left, right) if rows < columns else (right, left)
            with graph.inserting_before(product):
                if small not in transposed:
                    view = graph.call_function(aten.permute.default, (small, [1, 0]))
                    transposed[small] = graph.call_function(force_stride_order, (view, [length, 1]))
                found = graph.call_function(aten.mm.default, (transposed[small], large))
                if small is right:
                    found = graph.call_function(aten.permute.default, (found, [1, 0]))
            product.replace_all_uses_with(found)
            graph.erase_node(product)
