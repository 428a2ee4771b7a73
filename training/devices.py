"""Which device computes, and in which precision. In: settings, a device. Out: a device or a dtype. Cost: none."""

import ctypes

import torch

from training.settings import TrainSettings


def any_device() -> torch.device:
    """A GPU if there is one: for work that no rank does."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def give_back_memory(device: torch.device) -> None:
    """On a CPU, what was freed goes back to the system: gathered weights come and go there, and glibc keeps some.

    Cost: a millisecond. Of 2.25 GB of weights each of two ranks of ZeRO 3 otherwise keeps 0.14 GB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others do not
    if device.type == "cpu" and trim is not None:
        trim(0)


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
