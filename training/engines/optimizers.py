"""Optimizers by name, and which parameters decay.

In: settings and named parameters. Out: a torch optimizer. Matrices decay; norms and biases (fewer than two dimensions)
do not; B of adapters may have a learning rate of their own. AdamW is torch's fused kernel (CPU and GPU), Adafactor is
torch's, LAMB is ours; 8-bit states are bitsandbytes', imported only when asked for (up to 15 s on a cold disk). Cost:
two states a parameter.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.targets import load_target
from training.engines.engine import LR_RATIO, WEIGHT, Stored
from training.settings import OptimizerSettings


class Lamb(torch.optim.Optimizer):
    """Adam whose update of each matrix has a length proportional to the matrix's (arXiv 1904.00962).

    Vectors (norms, biases) have no trust ratio, as in the paper's code. NVLAMB (`normalise_gradients`) first divides
    all gradients by their global norm, as NVIDIA's BERT recipe does. Needs whole parameters (or DTensors, whose norms
    are global): flattened shards, as under ZeRO 1 to 3, would have the wrong lengths.
    """

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
        return 1.0 / max(length(gradients), 1e-12)

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
    weight_norm, update_norm = length([parameter]), length([update])
    return weight_norm / update_norm if weight_norm and update_norm else 1.0


def length(tensors: Iterable[Tensor]) -> float:
    """Norm of all numbers together, squares added in float64: in float32 that of 28 million is 0.2 % short on a CPU."""
    squares = (whole(torch.linalg.vector_norm(tensor, dtype=torch.float64)).item() ** 2 for tensor in tensors)
    return math.sqrt(math.fsum(squares))


def whole(value: Tensor) -> Tensor:
    """The full value of a DTensor (summed over its shards), or the tensor itself."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


Groups = list[dict[str, Any]]


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, ratio_of_b: float = 1.0
) -> Groups:
    """Trainable parameters: matrices with decay, norms and biases without; B of adapters apart where it is faster.

    :param ratio_of_b: learning rate of these over that of all others (LoRA+, arXiv 2402.12354)
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            faster = ratio_of_b != 1 and ".lora_B." in name
            groups.setdefault((faster, _dimensions(parameter) < 2), []).append(parameter)
    return [
        {
            "params": groups[faster, flat],
            "weight_decay": 0.0 if flat else weight_decay,
            LR_RATIO: ratio_of_b if faster else 1.0,
        }
        for faster, flat in sorted(groups)
    ]


def _dimensions(parameter: nn.Parameter) -> int:
    """Of the whole parameter: ZeRO-3 may have emptied it, and keeps its shape aside."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _adamw(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.adam_betas, eps=settings.adam_epsilon, fused=True
    )


def _adamw_8bit(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(
        groups, lr=settings.learning_rate, betas=settings.adam_betas, eps=settings.adam_epsilon
    )


def _lamb(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    return Lamb(
        groups,
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_epsilon,
        normalise_gradients=settings.use_nvlamb,
    )


def _lamb_8bit(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.LAMB8bit(
        groups, lr=settings.learning_rate, betas=settings.adam_betas, eps=settings.adam_epsilon
    )


def _adafactor(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=settings.learning_rate)


Build = Callable[[Groups, OptimizerSettings], torch.optim.Optimizer]
BUILDERS: dict[tuple[str, bool], Build] = {  # (name, 8 bits); `compatibility.py` refuses the other pairs
    ("AdamW", False): _adamw,
    ("AdamW", True): _adamw_8bit,
    ("LAMB", False): _lamb,
    ("LAMB", True): _lamb_8bit,
    ("Adafactor", False): _adafactor,
}


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """The optimizer that the settings name. A `_target_` node is called with the groups and `lr`."""
    groups = parameter_groups(parameters, settings.weight_decay, settings.loraplus_lr_ratio)
    if isinstance(settings.optimizer, dict):
        return load_target(settings.optimizer, "optimizer")(groups, lr=settings.learning_rate)
    return BUILDERS[settings.optimizer, settings.bit_training](groups, settings)


def restored_states(
    states: Mapping[str, Stored],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    place: Callable[[Stored], Tensor],
) -> dict[str, Tensor | int]:
    """The states of a parameter on `device`, from those of a checkpoint; `place` reads the tensors among them there."""
    return {
        key: place(stored) if stored.shape else restored_number(stored.whole(), optimizer, device)
        for key, stored in states.items()
        if key != WEIGHT
    }


def restored_number(value: Tensor, optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor | int:
    """A number of an optimizer's state, the steps it has made, as the optimizer itself keeps it.

    Fused kernels read it on the device of the parameter, where a number on the CPU ends a GPU's process with an illegal
    memory access; the others keep it on the CPU; bitsandbytes counts in Python.
    """
    if not value.is_floating_point():
        return int(value)
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return value.to(device if on_device else "cpu", copy=True)
