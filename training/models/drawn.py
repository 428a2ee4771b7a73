"""A model from scratch without its weights: each is drawn from the seed when an engine is ready to keep its part.

In: how transformers makes the model. Out: that model, its large parameters empty, and their `Values`. The numbers are
those that transformers draws (`tests/training/models/test_drawn.py`): torch's layers draw theirs when they are made,
transformers draws again, module by module, and what either leaves is emptied at once. Before the second time the state
of the generator is noted, so that one module can be drawn once more. No process ever holds more than one of them.

For kinds of models whose modules are initialised each by itself (`KINDS`); others are made whole. Cost: the numbers are
drawn three times instead of twice.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.models.deferred import Value, Values, replace

KINDS = frozenset(("llama", "qwen2", "qwen3", "mistral", "olmo", "olmo2", "granite", "phi3", "smollm3"))
LAYERS = (nn.Linear, nn.Embedding)


def drawn(kind: str, build: Callable[[], PreTrainedModel], values: Values) -> PreTrainedModel:
    """The model of `build`, empty where `values` will draw; whole where its kind is not known."""
    values.clear()
    if kind not in KINDS:
        return build()
    with _emptying(), patch.object(PreTrainedModel, "_initialize_weights", _noting(values)):
        model = build()
    kept = set(model.parameters())
    for parameter in [parameter for parameter in values if parameter not in kept]:
        del values[parameter]  # it was tied to another one
    return model


@contextmanager
def _emptying() -> Iterator[None]:
    """Within it, linear layers and embeddings let go of their parameters when they have been made."""
    with patch.object(LAYERS[0], "__init__", _and_empty(LAYERS[0])):  # noqa: SIM117  # two of a kind
        with patch.object(LAYERS[1], "__init__", _and_empty(LAYERS[1])):
            yield


def _and_empty(layer: type[nn.Module]) -> Callable[..., None]:
    make: Any = layer.__init__

    def init(self: nn.Module, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        for parameter in self.parameters(recurse=False):
            replace(parameter, torch.empty_like(parameter, device="meta"))

    return init


def _noting(values: Values) -> Callable[..., None]:
    """transformers' initialisation of a module; of an empty one the numbers are noted, not kept."""
    initialise: Any = PreTrainedModel._initialize_weights

    def note(model: PreTrainedModel, module: nn.Module, *arguments: Any) -> None:
        empty = {name: one for name, one in module.named_parameters(recurse=False) if one.is_meta}
        if empty and not getattr(module, "_is_hf_initialized", False):  # as it may be of a model within this one
            draw = partial(_filled, model, module, _likes(module))
            for name, parameter in empty.items():
                values[parameter] = Value(partial(_again, draw, torch.get_rng_state(), name), parameter.dtype)
            draw()
            module._is_hf_initialized = True  # type: ignore[assignment]  # what transformers notes
        else:
            initialise(model, module, *arguments)

    return note


def _again(draw: Callable[[], dict[str, Tensor]], state: Tensor, name: str) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        return draw()[name]


Likes = dict[str, Tensor | None]


def _likes(module: nn.Module) -> Likes:
    """Tensors without memory like the parameters of a module, which an engine may change later."""
    return {
        name: None if one is None else torch.empty_like(one, device="meta") for name, one in module._parameters.items()
    }


def _filled(model: PreTrainedModel, module: nn.Module, likes: Likes) -> dict[str, Tensor]:
    """The parameters of a module as transformers draws them now, in a copy of it."""
    twin = copy.copy(module)
    twin._parameters = {
        name: None if one is None else nn.Parameter(torch.empty(one.shape, dtype=one.dtype))
        for name, one in likes.items()
    }
    with torch.no_grad():
        model._init_weights(twin)
    return {name: one.detach() for name, one in twin._parameters.items() if one is not None}
