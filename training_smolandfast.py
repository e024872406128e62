"""What `Trainer` needs to train a SmolAndFast policy: the data collator, the optimizer, the precision.

Importing this file also registers the attention of `attention_smolandfast.py` with Transformers.
"""

import ctypes
import platform
import time

import torch
from torch.optim.adamw import adamw
from transformers import AttentionInterface, AttentionMaskInterface, BatchFeature
from transformers.masking_utils import sdpa_mask

from .attention_smolandfast import bf16_training_attention
from .modeling_smolandfast import SmolAndFastForActionPrediction
from .processing_smolandfast import SmolAndFastProcessor

AttentionInterface.register("bf16_training", bf16_training_attention)
AttentionMaskInterface.register("bf16_training", sdpa_mask)


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
    """An optimizer's parameter groups, with a learning rate for each part of the model. The head counts as text.

    Biases, norms and everything frozen are as `Trainer` has them: without decay, left out. With `peft`, these are the
    adapters' parameters alone.
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


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
NUM_ELEMENTS = 2**18  # of a parameter are updated at once, so that what belongs to them stays in fast memory


def keep_freed_memory() -> bool:
    """Have this process keep the memory it frees, for its next tensors: a training step on a CPU is then faster.

    By default glibc takes every tensor of 32 MB or more from the system and gives it back when it is freed, so each
    step pays anew for pages filled with zeros. Peak memory may grow, since what is freed does not always fit what
    comes next; and what is freed is no longer there for other processes.

    Returns:
        Whether it is so from now on: elsewhere than on Linux with glibc nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))


class MasterWeightsAdamW(torch.optim.Optimizer):
    """AdamW for a model in bf16, whose updates are too small for bf16: it adds them up in fp32.

    The state of each parameter holds its fp32 value (`master`) and AdamW's two moments in fp32; the model gets the
    rounded value. As in mixed-precision training (Micikevicius et al. 2018), 14 bytes a parameter and 2 for gradients.
    """

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            master = parameter.detach().to(torch.float32, copy=True)
            state |= {"master": master, "step": torch.zeros((), device=master.device)}
            state |= {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
        weights = (parameter.detach(), state["master"], parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        rows = max(NUM_ELEMENTS * len(torch.atleast_1d(parameter)) // parameter.numel(), 1)
        pieces = zip(*(torch.atleast_1d(x).split(rows) for x in weights), strict=True)
        for rounded, master, gradient, exp_avg, exp_avg_sq in pieces:
            adamw(
                [master],
                [gradient.float()],
                [exp_avg],
                [exp_avg_sq],
                [],
                [state["step"].clone()],  # `adamw` counts the step, at every piece
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            rounded.copy_(master)
        state["step"] += 1

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)  # rounds the state to the parameters' bf16: put back what was saved
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for i, parameter in zip(ids, parameters, strict=True):
            saved = state_dict["state"].get(i, {})
            self.state[parameter].update(
                {name: value.to(parameter.device, copy=True) for name, value in saved.items()}
            )


def make_optimizer(
    model: SmolAndFastForActionPrediction,
    *learning_rates: float,
    betas: tuple[float, float] = (0.9, 0.95),
    **kwargs: float,
) -> torch.optim.AdamW | MasterWeightsAdamW:
    """AdamW for `Trainer(optimizers=(optimizer, None))`; for a model in bf16, with fp32 master weights.

    Args:
        learning_rates, kwargs: Those of [`parameter_groups`].
        betas: AdamW's decay rates of the two moments.
    """
    groups = parameter_groups(model, *learning_rates, **kwargs)
    if any(parameter.dtype == torch.bfloat16 for group in groups for parameter in group["params"]):
        return MasterWeightsAdamW(groups, betas=betas)
    return torch.optim.AdamW(groups, betas=betas, fused=True)


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
