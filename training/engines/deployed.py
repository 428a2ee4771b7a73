"""A deployed model to be used: whole, or a base with one adapter or several, loaded once and switched between.

In: a directory of whole weights (or the base's), directories of adapters by name, settings, ranks. Out: `UsedModel`, in
evaluation mode, in the precision of the settings and in 4 bits where they say so, on the device of this rank. All ranks
call it together, with the same number of forward passes. Adapters are not merged. Code that comes with a checkpoint
runs only where the settings trust it. Cost: the weights, on each rank its share.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method

from training.devices import compute_dtype
from training.distributed import Ranks
from training.engines.fsdp import shard
from training.errors import ModelError
from training.launch.heartbeat import SignsOfLife
from training.models.build import four_bits, keep_differentiable, load_complete
from training.models.deferred import Values, check_filled, deferring
from training.models.hub import base_of
from training.models.loss import CausalLMLoss
from training.settings import TrainSettings

ONLY = "default"


class UsedModel(CausalLMLoss):
    """Losses of targets, and texts."""

    @contextmanager
    def speaking_as(self, adapter: str | None) -> Iterator[None]:
        """Use this adapter, or (None) the weights without any."""
        if adapter is not None:
            self.model.set_adapter(adapter, inference_mode=True)
        elif hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                yield
            return
        yield

    def generate(self, **options: Any) -> Tensor:
        """The ids that transformers' own generation gives. All ranks together, with the same prompts."""
        return self.model.generate(**options)


def load_run(model_dir: Path, settings: TrainSettings, ranks: Ranks) -> UsedModel:
    """What lies in RUN/model: whole weights, or an adapter on the base that it refers to."""
    base = base_of(model_dir)
    if base is None:
        return load(model_dir, {}, settings, ranks)
    return load(Path(base), {ONLY: model_dir}, settings, ranks)


def load(directory: Path, adapters: dict[str, Path], settings: TrainSettings, ranks: Ranks) -> UsedModel:
    """Weights, and adapters on them, of which the first is in use."""
    empty = empty_weights(directory, settings, ranks)
    for name, adapter in adapters.items():
        add_adapter(empty, name, adapter)
    return in_use(empty, ranks)


@dataclass
class Empty:
    """A model, the values of what is still empty of it."""

    model: Any
    values: Values


def empty_weights(directory: Path, settings: TrainSettings, ranks: Ranks) -> Empty:
    """The model of a directory, without adapters."""
    dtype, values = compute_dtype(settings, ranks.device), Values()
    options: dict[str, Any] = {"quantization_config": four_bits(dtype)} if settings.use_quant else {}
    with deferring(values):
        model = load_complete(directory, settings.trust_remote_code, dtype=dtype, **options)
    return Empty(keep_differentiable(model), values)


def add_adapter(empty: Empty, name: str, directory: Path) -> None:
    """Give the model one adapter more."""
    from peft import PeftModel

    try:
        with empty.values.standing_in():
            if hasattr(empty.model, "peft_config"):
                empty.model.load_adapter(directory, adapter_name=name)
            else:
                empty.model = PeftModel.from_pretrained(empty.model, directory, adapter_name=name)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{directory}: no adapter of this model ({error})") from error


def in_use(empty: Empty, ranks: Ranks) -> UsedModel:
    """Weights and adapters, ready to be asked: whole on one rank, shared out by FSDP2 over several."""
    module: Any = UsedModel(empty.model.requires_grad_(False)).eval()
    if ranks.world_size == 1:
        empty.values.fill(ranks.device, SignsOfLife("loading the model", len(empty.values), "tensors"))
        check_filled(module)
        return module.to(ranks.device)
    shard(module, ranks, empty.values, MixedPrecisionPolicy())  # computed in what it is loaded in
    register_fsdp_forward_method(module, "generate")
    module.register_forward_hook(lambda *_: module.reshard())  # it waits for a backward pass, gathered
    return module
