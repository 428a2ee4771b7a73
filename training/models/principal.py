"""PiSSA: an adapter that starts from the largest parts of the weights, and a base without them (arXiv 2404.02948).

In: peft's wrapper of a model whose weights are still empty. Out: the same, whose weights and adapter are values that
are computed when an engine fills them: ``W - scale B A``, A and B, of a randomised decomposition (as peft's
``pissa_niter_4``) that depends on the weight and the seed alone, so that a resumed run finds the same rest. What is
deployed is a plain adapter of twice the rank on the base as it was, as peft's conversion makes it:

    W + scale (B_trained A_trained - B A) = W + scale [B_trained, -B] [A_trained; A]

Cost: a decomposition of every adapted matrix on every rank at every start, on its GPU where it has one, and once more
when the adapter is written; memory of one of them.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.devices import any_device
from training.errors import ModelError
from training.models.deferred import Value, Values
from training.models.hub import ADAPTER

ITERATIONS = 4
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, eq=False)
class Principal:
    """The largest parts of a weight."""

    weight: Value
    rank: int
    scale: float
    turned: bool  # whether the weight lies the other way round
    seed: int

    def a(self) -> Tensor:
        """``(rank, in) float32``"""
        return _decomposed(self)[0]

    def b(self) -> Tensor:
        """``(out, rank) float32``"""
        return _decomposed(self)[1]

    def rest(self) -> Tensor:
        """The weight without them, as it lies."""
        a, b = _decomposed(self)
        part = self.scale * (b @ a)
        return (self.weight.read().float() - (part.t() if self.turned else part)).to(self.weight.dtype).contiguous()


@lru_cache(maxsize=1)  # the three values of a layer are read one after another
def _decomposed(of: Principal) -> tuple[Tensor, Tensor]:
    """A and B on the CPU, laid out as engines send them; of a rank above that of the weight the last parts are 0."""
    device = any_device()
    weight = of.weight.read().to(device, torch.float32)
    weight = weight.t() if of.turned else weight
    with torch.random.fork_rng():
        torch.manual_seed(of.seed)
        u, s, v = torch.svd_lowrank(weight, min(of.rank, *weight.shape), niter=ITERATIONS)
    root = (s / of.scale).sqrt()
    missing = of.rank - len(s)
    a, b = root.unsqueeze(1) * v.t(), u * root
    padded = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
    return padded[0].cpu().contiguous(), padded[1].cpu().contiguous()


def start_from_principal(model: Any, values: Values, seed: int) -> None:
    """Let the adapter of a model start from the largest parts of its weights.

    :raises ModelError: weights are in memory already.
    """
    model.principal = {}
    for name, layer in _adapted(model):
        base, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if base not in values:
            raise ModelError(
                f"init_lora_weights=pissa: {name} is not read by itself: transformers joins or splits tensors of this "
                "model; leave it out"
            )
        turned = getattr(layer, "fan_in_fan_out", False)
        parts = Principal(values[base], layer.r["default"], layer.scaling["default"], turned, seed)
        values[base] = Value(parts.rest, parts.weight.dtype)
        for parameter, read in ((a, parts.a), (b, parts.b)):
            torch.utils.swap_tensors(parameter, nn.Parameter(torch.empty_like(parameter, device="meta")))
            values[parameter] = Value(read, torch.float32)
        model.principal[name] = parts


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            yield name, layer


def write_as_plain(model: Any, directory: Path, alive: Callable[[int], None] = lambda done: None) -> None:
    """Make the adapter in a directory, trained from the principal parts of this model, one for the base as it was.

    :param alive: hears how many layers are done
    """
    tensors = load_file(directory / WEIGHTS)
    for done, (name, parts) in enumerate(model.principal.items()):
        alive(done)
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        tensors[a] = torch.cat([tensors[a], parts.a().to(tensors[a].dtype)])
        tensors[b] = torch.cat([tensors[b], -parts.b().to(tensors[b].dtype)], dim=1).contiguous()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((directory / ADAPTER).read_text(encoding="utf-8"))
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2
    config["r"] *= 2
    (directory / ADAPTER).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
