"""Muon for the matrices inside the layers, AdamW for the rest, as one optimizer for `Trainer`.

From random weights, the tiny vision tower needed half as many samples with Muon (Jordan et al. 2024, PyTorch 2.9 or
newer) as with AdamW; `benchmarks/pusht_recipe.md` has the figures. Muon optimizes matrices only.
"""

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """A `torch.optim.Muon` and a `torch.optim.AdamW`, for other parameters, that step together."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.optimizers = {"muon": muon, "adamw": adamw}
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # Schedulers write learning rates into this optimizer's groups, so these must be the groups of the two.
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
    return MuonWithAdamW(
        torch.optim.Muon([group for group in muon if group["params"]], adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([group for group in adamw if group["params"]], betas=(0.9, 0.95), fused=True),
    )
