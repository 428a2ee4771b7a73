"""A model whose layers are read when their turn comes in a forward pass, and dropped after it.

In: an empty model and the values of its parameters (`training.models.deferred`). Out: the model, for forward passes
without gradients, on a device. Only what is outside of the layers (embeddings, output layer) is read for good. Cost:
memory for that and one layer; every forward pass reads all files, so that one should ask everything at once.
"""

from typing import Any

import torch
from torch import nn

from training.models.build import Empty
from training.models.deferred import Value, replace
from training.models.loss import causal_model


def streamed(empty: Empty, device: torch.device) -> nn.Module:
    """The model of `empty`, which keeps no layer."""
    names = set(causal_model(empty.model)._no_split_modules or ())
    for layer in (part for part in empty.model.modules() if type(part).__name__ in names):
        _read_when_called(layer, empty, device)
    empty.values.fill(device)
    for tensor in (*empty.model.parameters(), *empty.model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    return empty.model


def _read_when_called(layer: nn.Module, empty: Empty, device: torch.device) -> None:
    mine: dict[nn.Parameter, Value] = {}
    for parameter in layer.parameters():
        if parameter in empty.values:
            mine[parameter] = empty.values.pop(parameter)

    def fill(*_: Any) -> None:
        for parameter, value in mine.items():
            replace(parameter, value.read().to(device, value.dtype))

    def drop(*_: Any) -> None:
        for parameter in mine:
            replace(parameter, torch.empty_like(parameter, device="meta"))

    layer.register_forward_pre_hook(fill)
    layer.register_forward_hook(drop)
