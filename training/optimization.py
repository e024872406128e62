"""A learning rate for each part of the model, and the precision that is faster on this machine."""

import time

import torch

from ..modeling_smolandfast import SmolAndFastForActionPrediction


def parameter_groups(
    model: SmolAndFastForActionPrediction,
    vision_learning_rate: float = 2e-5,
    connector_learning_rate: float = 2e-4,
    text_learning_rate: float = 2e-4,
    weight_decay: float = 0.01,
) -> list[dict]:
    """An optimizer's parameter groups, with a learning rate for each part of the model. The head counts as text.

    As in `Trainer`, biases and norms have no decay, and frozen parameters are left out: with `peft`, only the adapters
    remain.
    """
    learning_rates = {
        "model.vision_model.": vision_learning_rate,
        "model.connector.": connector_learning_rate,
        "": text_learning_rate,
    }
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next(prefix for prefix in learning_rates if prefix in name)
            groups.setdefault((part, parameter.ndim >= 2), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rates[part], "weight_decay": weight_decay if has_decay else 0.0}
        for (part, has_decay), parameters in groups.items()
    ]


def make_optimizer(
    model: SmolAndFastForActionPrediction,
    *learning_rates: float,
    betas: tuple[float, float] = (0.9, 0.95),
    **kwargs: float,
) -> torch.optim.AdamW:
    """AdamW for `Trainer(optimizers=(optimizer, None))`.

    Args:
        learning_rates, kwargs: Those of [`parameter_groups`].
        betas: AdamW's decay rates of the two moments.

    Raises:
        ValueError: Trainable weights in bf16: most updates are smaller than its rounding.
    """
    groups = parameter_groups(model, *learning_rates, **kwargs)
    if any(parameter.dtype == torch.bfloat16 for group in groups for parameter in group["params"]):
        raise ValueError(
            "Weights to train are in bf16, too coarse for AdamW's updates. Load the model with dtype=torch.float32, "
            "and train under autocast with TrainingArguments(bf16=True)."
        )
    # Schedulers that end at an absolute rate take this default, of the fastest part, for the peak.
    return torch.optim.AdamW(groups, lr=max((group["lr"] for group in groups), default=0.0), betas=betas, fused=True)


def bf16_is_faster(size: int = 512, repeats: int = 10) -> bool:
    """Whether bf16 matrix products beat fp32 on this machine, as they do with AMX or a GPU.

    Times both, alternating, on the device that `Trainer` would use: for `repeats` rounds, or until one is far ahead.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrices = {dtype: torch.ones(size, size, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(matrices, 0.0)
    for repeat in range(repeats + 1):
        for dtype, matrix in matrices.items():
            start = time.perf_counter()
            (matrix @ matrix).sum().item()
            seconds[dtype] += time.perf_counter() - start if repeat else 0.0  # the first is for warming up
        if max(seconds.values()) > max(0.5, 5 * min(seconds.values())):  # bf16 without hardware is that slow
            break
    return seconds[torch.bfloat16] < seconds[torch.float32]
