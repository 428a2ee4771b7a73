"""LAMB: Adam whose update of each parameter has a length proportional to the parameter's (arXiv 1904.00962).

In: parameter groups. Out: updated parameters. NVLAMB (`normalise_gradients`) first divides all gradients by their
global norm, as NVIDIA's BERT recipe does. State is Adam's: two moments. Needs whole parameters (or DTensors, whose
norms are global): an optimizer that sees flattened shards, as under ZeRO 1 to 3, would compute the wrong lengths.
"""

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptive moments; vectors (norms, biases) have no trust ratio, as in the paper's code."""

    def __init__(self, params, *, normalise_gradients: bool = False, **hyper_parameters):
        """`hyper_parameters`: lr, betas, eps, weight_decay, as for torch's AdamW."""
        self.normalise_gradients = normalise_gradients
        super().__init__(params, {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, **hyper_parameters})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        scale = self._gradient_scale()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad * scale, group)

    def _gradient_scale(self) -> float:
        if not self.normalise_gradients:
            return 1.0
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return 1.0 / max(whole(norm).item(), 1e-12)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = state["step"].item()
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = (state["exp_avg"] / (1 - beta1**step)).div_(denominator)
        if group["weight_decay"]:
            update.add_(parameter, alpha=group["weight_decay"])
        parameter.sub_(update * (group["lr"] * trust_ratio(parameter, update)))


def trust_ratio(parameter: Tensor, update: Tensor) -> float:
    """Length of the parameter over length of its update; 1 where either is 0, and for vectors (norms, biases)."""
    if parameter.dim() < 2:
        return 1.0
    weight_norm, update_norm = whole(parameter.norm()).item(), whole(update.norm()).item()
    return weight_norm / update_norm if weight_norm and update_norm else 1.0


def whole(value: Tensor) -> Tensor:
    """The full value of a DTensor (summed over its shards), or the tensor itself."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
