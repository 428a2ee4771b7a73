"""Which device computes, and in which precision. In: settings, a device. Out: a device or a dtype. Cost: none."""

import ctypes
from collections.abc import Iterable

import torch
from torch import nn

from training.settings import TrainSettings


def any_device() -> torch.device:
    """A GPU if there is one: for work that no rank does."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def give_back_memory(device: torch.device) -> None:
    """On a CPU, what was freed goes back to the system: gathered weights come and go there, and glibc keeps some.

    Cost: a millisecond.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others do not
    if device.type == "cpu" and trim is not None:
        trim(0)


def give_back_after(modules: Iterable[nn.Module], device: torch.device) -> None:
    """`give_back_memory` after every forward pass of these, that of a checkpointed backward pass too."""
    for module in modules if device.type == "cpu" else ():
        module.register_forward_hook(lambda *_: give_back_memory(device))


def uses_bf16(settings: TrainSettings, device: torch.device) -> bool:
    """`auto` is bfloat16 on GPUs that have it and float32 elsewhere."""
    if settings.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return settings.precision == "bf16"


def compute_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype:
    return torch.bfloat16 if uses_bf16(settings, device) else torch.float32


def load_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype:
    """What weights are loaded as; adapters are float32 always."""
    return compute_dtype(settings, device) if settings.loads_what_it_computes_in else torch.float32
