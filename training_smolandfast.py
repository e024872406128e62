"""What `Trainer` needs to train a SmolAndFast policy: the data collator, the optimizer's groups, the precision."""

import time

import torch
from transformers import BatchFeature

from .modeling_smolandfast import SmolAndFastForActionPrediction
from .processing_smolandfast import SmolAndFastProcessor


class ActionDataCollator:
    """Turns samples into a batch with labels, through the processor.

    A sample is a dictionary with `images` (one a camera), `text` (the task), `state` `(state_dim,)` and `actions`
    `(chunk_size, action_dim)`, in the robot's units.
    """

    def __init__(self, processor: SmolAndFastProcessor):
        self.processor = processor

    def __call__(self, samples: list[dict]) -> BatchFeature:
        columns = {name: [sample[name] for sample in samples] for name in ("images", "text", "state", "actions")}
        return self.processor(**columns)


def parameter_groups(
    model: SmolAndFastForActionPrediction,
    vision_learning_rate: float = 2e-5,
    connector_learning_rate: float = 2e-4,
    text_learning_rate: float = 2e-4,
    weight_decay: float = 0.01,
) -> list[dict]:
    """The groups of an optimizer, with `lr` and `weight_decay` for each part of the model.

    The head counts as text. Biases, norms and everything frozen are as `Trainer` has them: without decay, left out.
    """
    learning_rates = {
        "model.vision_model.": vision_learning_rate,
        "model.connector.": connector_learning_rate,
        "": text_learning_rate,
    }
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next(prefix for prefix in learning_rates if name.startswith(prefix))
            groups.setdefault((part, parameter.ndim >= 2), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rates[part], "weight_decay": weight_decay if has_decay else 0.0}
        for (part, has_decay), parameters in groups.items()
    ]


def make_optimizer(
    model: SmolAndFastForActionPrediction, *args, betas: tuple[float, float] = (0.9, 0.95), **kwargs
) -> torch.optim.AdamW:
    """AdamW over [`parameter_groups`], which takes the other arguments: `Trainer(optimizers=(optimizer, None))`."""
    return torch.optim.AdamW(parameter_groups(model, *args, **kwargs), betas=betas, fused=True)


def bf16_is_faster(size: int = 512, repeats: int = 10) -> bool:
    """Whether bf16 matrix products beat fp32 on this machine: by far with AMX or a GPU, and not at all without.

    Times both, alternating, on the device that `Trainer` would use.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrices = {dtype: torch.ones(size, size, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(matrices, 0.0)
    for repeat in range(repeats + 1):
        for dtype, matrix in matrices.items():
            start = time.perf_counter()
            (matrix @ matrix).sum().item()
            seconds[dtype] += time.perf_counter() - start if repeat else 0.0  # the first is for warming up
    return seconds[torch.bfloat16] < seconds[torch.float32]
