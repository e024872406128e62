"""Muon for the matrices inside the layers, AdamW for the rest, as one optimizer for `Trainer`.

From random weights, Muon (Jordan et al. 2024, `torch.optim.Muon`, PyTorch 2.9 or newer) taught the tiny vision tower
to see in half the samples that AdamW took; `benchmarks/pusht_recipe.md` has the figures. It knows matrices only.
"""

import itertools

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers that step together.

    Args:
        muon: `torch.optim.Muon`.
        adamw: `torch.optim.AdamW`, over the other parameters.
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.optimizers = {"muon": muon, "adamw": adamw}
        super().__init__(list(itertools.chain(muon.param_groups, adamw.param_groups)), {})
        self._share()

    def _share(self) -> None:
        # A scheduler writes its learning rates into the groups of this optimizer: let them be those of the two.
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
        self._share()


def make_muon(model: torch.nn.Module, parameter_groups: list[dict]) -> MuonWithAdamW:
    """Muon for the matrices of `model`'s transformer layers, AdamW for its other parameters.

    Args:
        parameter_groups: Each with `params`, `lr` and `weight_decay`. Muon, scaled as AdamW is, takes twice the `lr`.
    """
    matrices = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name}
    layers, others = [], []
    for group in parameter_groups:
        inside = [p for p in group["params"] if id(p) in matrices]
        outside = [p for p in group["params"] if id(p) not in matrices]
        if inside:
            layers.append({**group, "params": inside, "lr": 2 * group["lr"]})
        if outside:
            others.append({**group, "params": outside})
    return MuonWithAdamW(
        torch.optim.Muon(layers, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), fused=True),
    )
