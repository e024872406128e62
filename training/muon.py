"""Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for the rest, as one optimizer for `Trainer`.

From random weights, the tiny vision tower needed half as many samples with Muon as with AdamW (`LOG.md`).
"""

import math

import torch

from .optimization import bf16_is_faster


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")` that computes in `dtype`.

    PyTorch's computes in bf16 only. On a processor without bf16 products, its step takes many times as long as the
    forward and backward passes of the tiny policy.
    """

    def __init__(self, params, lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 0.05)
                update = orthogonalized(parameter.grad.lerp(momentum, 0.95).to(self.dtype))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Bring the singular values near 1: five Newton-Schulz steps with the coefficients of Jordan et al."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class MuonWithAdamW(torch.optim.Optimizer):
    """A [`Muon`] and a `torch.optim.AdamW` for disjoint parameters, which step together."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.optimizers = {"muon": muon, "adamw": adamw}
        super().__init__([*muon.param_groups, *adamw.param_groups], {"lr": adamw.defaults["lr"]})
        self._share_groups()

    def _share_groups(self) -> None:
        # Schedulers write learning rates into this optimizer's groups, so they must be the groups of the two.
        self.param_groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def step(self, closure=None):
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state_dict: dict) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict[name])
        self._share_groups()


def make_muon(model: torch.nn.Module, parameter_groups: list[dict]) -> MuonWithAdamW:
    """Muon for the matrices of `model`'s transformer layers, AdamW for its other parameters.

    Args:
        parameter_groups: Each with `params`, `lr` and `weight_decay`. Muon, scaled to match AdamW, uses 2 * `lr`.
    """
    matrices = {p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name}
    muon, adamw = [], []
    for group in parameter_groups:
        muon.append({**group, "params": [p for p in group["params"] if p in matrices], "lr": 2 * group["lr"]})
        adamw.append({**group, "params": [p for p in group["params"] if p not in matrices]})
    dtype = torch.bfloat16 if bf16_is_faster() else torch.float32
    peak = max(group["lr"] for group in parameter_groups)  # schedulers divide an absolute final rate by it
    return MuonWithAdamW(
        Muon([group for group in muon if group["params"]], lr=0.0, weight_decay=0.0, dtype=dtype),
        torch.optim.AdamW([group for group in adamw if group["params"]], lr=peak, betas=(0.9, 0.95), fused=True),
    )
