"""What the loop needs from an engine that shards training: four verbs and the state by parameter name.

DeepSpeed (`deepspeed.py`) and FSDP2 (`fsdp.py`) implement it. Both average gradients over the ranks; the
loop undoes that by multiplying the loss by `averaging`, so that gradients are sums, as if one rank had done it all.

`read` and `write` speak of pieces of whole parameters, by name and place: a checkpoint of N ranks therefore resumes on
M. No rank is asked for what another one has, and nothing is gathered: nor by `held`, which gives what is deployed.
`gathered` is for adapters, one tensor at a time.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.distributed import Ranks
from training.models.loss import CausalLMLoss, causal_model
from training.models.shards import Piece

WEIGHT = "weight"  # key of the parameter itself, float32, beside its optimizer state
LR_RATIO = "lr_ratio"  # key of a group of parameters


class Stored(Protocol):
    """A weight or a state in a checkpoint."""

    shape: tuple[int, ...]

    def part(self, start: int, length: int) -> Tensor:
        """``(length,)`` numbers of the flattened tensor, on the CPU."""

    def whole(self) -> Tensor:
        """All of it, in its shape."""


class Engine(Protocol):
    """A model of which the weights, gradients or optimizer states may be sharded over the ranks."""

    module: CausalLMLoss  # call `forward`, never this
    ranks: Ranks

    @property
    def averaging(self) -> float:
        """Gradients come out divided by this."""
        ...

    def forward(self, *arguments, **options) -> Any:
        """Call `CausalLMLoss`, gathering weights as needed; returns what it returns. All ranks together."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; `last` marks the last micro-batch of a step. All ranks together."""

    def step(self, learning_rate: float, limit: float = math.inf) -> float:
        """Clip, update, clear; returns the gradient norm before clipping.

        A norm above the limit: nothing is updated, gradients are cleared. Non-finite: the same, returns nan or inf.
        """

    def trained(self) -> list[str]:
        """Names of the parameters that `read` gives."""

    def read(self) -> Iterator[tuple[str, dict[str, Piece]]]:
        """(name, {weight, optimizer states}) of every trainable parameter: together the ranks have each number once."""

    def write(self, name: str, states: Mapping[str, Stored]) -> None:
        """Put back what `read` gave, on whichever ranks: takes the ranges of this rank's shard."""

    def held(self) -> Iterator[tuple[str, Piece]]:
        """(name, this rank's part) of every tensor that is saved with the model, in the type in which it is used.

        Together the ranks have each number once.
        """

    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole weight on the CPU) of every trained parameter. All ranks together."""


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


def saved(module: CausalLMLoss) -> list[tuple[str, Tensor]]:
    """(name inside the model, its tensor as it is) of what is saved with a model."""
    return list(module.model.state_dict(keep_vars=True).items())


def share(value: Tensor, ranks: Ranks) -> Piece:
    """This rank's part of what every rank has whole."""
    flat = value.detach().reshape(-1)
    start, end = (flat.numel() * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    return Piece(flat[start:end], start, tuple(value.shape))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Of every group of parameters that of all, times its own ratio where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(LR_RATIO, 1.0)
