"""Optimizers by name, and which parameters decay.

In: settings and named parameters. Out: a torch optimizer. Matrices decay; norms and biases (fewer than two dimensions)
do not. AdamW is torch's fused kernel (CPU and GPU). LAMB is ours (`training/lamb.py`); Adafactor is torch's; 8-bit
states are bitsandbytes', imported only when asked for (up to 15 s on a cold disk).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.target import load_target
from training.engine import WEIGHT
from training.lamb import Lamb
from training.settings import OptimizerSettings

Groups = list[dict[str, Any]]


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> Groups:
    """Trainable parameters in two groups: matrices with decay, norms and biases without."""
    trainable = [parameter for _, parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if _dimensions(parameter) >= 2]
    rest = [parameter for parameter in trainable if _dimensions(parameter) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


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
OPTIMIZERS: dict[tuple[str, bool], Build] = {  # (name, 8 bits); `compatibility.py` refuses the other pairs
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
    groups = parameter_groups(parameters, settings.weight_decay)
    if isinstance(settings.optimizer, dict):
        return load_target(settings.optimizer, "optimizer")(groups, lr=settings.learning_rate)
    return OPTIMIZERS[settings.optimizer, settings.bit_training](groups, settings)


def restored_states(
    state: dict[str, Tensor], optimizer: torch.optim.Optimizer, device: torch.device, place: Callable[[Tensor], Tensor]
) -> dict[str, Tensor | int]:
    """The states of a parameter on `device`, from those of a checkpoint; `place` puts the tensors among them there."""
    return {
        key: place(value) if value.dim() else restored_number(value, optimizer, device)
        for key, value in state.items()
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
