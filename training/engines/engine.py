"""What the loop needs from an engine that shards training: four verbs and the state by parameter name.

DeepSpeed (`deepspeed.py`) and FSDP2 (`fsdp.py`) implement it. Both average gradients over the ranks; the
loop undoes that by multiplying the loss by `averaging`, so that gradients are sums, as if one rank had done it all.

`read` and `write` speak of whole parameters by name, not of shards: a checkpoint of N ranks therefore resumes on M.
Cost: every trainable parameter is gathered once, one at a time, to every rank.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from training.distributed import Ranks
from training.models.loss import CausalLMLoss, causal_model

WEIGHT = "weight"  # key of the parameter itself, float32, beside its optimizer state


class Engine(Protocol):
    """A model of which the weights, gradients or optimizer states may be sharded over the ranks."""

    module: CausalLMLoss  # call `forward`, never this
    ranks: Ranks

    @property
    def averaging(self) -> float:
        """Gradients come out divided by this."""
        ...

    def forward(self, *arguments, **options) -> Tensor:
        """Call `CausalLMLoss`, gathering weights as needed. All ranks together."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; `last` marks the last micro-batch of a step. All ranks together."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; returns the gradient norm before clipping. Non-finite: no update, returns nan or inf."""

    def trained(self) -> list[str]:
        """Names of the parameters that `read` gives."""

    def read(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, {weight, optimizer state}) of every trainable parameter, whole, on the CPU. All ranks together."""

    def write(self, name: str, state: dict[str, Tensor]) -> None:
        """Put back what `read` gave, into this rank's shard."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole weight on the CPU) of every tensor that is saved with a model. All ranks together."""


def model_name(name: str) -> str:
    """Name of a parameter inside the model, from its name inside `CausalLMLoss`."""
    return name.removeprefix("model.")


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name inside the model, parameter) of what is trained, each shared parameter once."""
    named = [(model_name(name), parameter) for name, parameter in module.named_parameters()]
    return [(name, parameter) for name, parameter in named if parameter.requires_grad]


def decoder_layers(module: CausalLMLoss) -> list[nn.Module]:
    """The layers that transformers says must not be split."""
    names = set(causal_model(module.model)._no_split_modules or ())
    return [part for part in module.modules() if type(part).__name__ in names]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
