"""A deployed model to be used: whole, or a base with one adapter or several, loaded once and switched between.

In: a directory of whole weights (or the base's), directories of adapters by name, settings, ranks. Out: `UsedModel`, in
evaluation mode, in the precision of the settings and in 4 bits where they say so, on the device of this rank. All ranks
call it together, with the same number of forward passes. Adapters are not merged. Code that comes with a checkpoint
runs only where the settings trust it. Cost: the weights, on each rank its share.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from training.devices import compute_dtype
from training.distributed import Ranks
from training.errors import ModelError
from training.models.build import four_bits, keep_differentiable, load_complete
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
        """The ids that transformers' own generation gives."""
        return self.model.generate(**options)


def load_run(model_dir: Path, settings: TrainSettings, ranks: Ranks) -> UsedModel:
    """What lies in RUN/model: whole weights, or an adapter on the base that it refers to."""
    base = base_of(model_dir)
    if base is None:
        return load(model_dir, {}, settings, ranks)
    return load(Path(base), {ONLY: model_dir}, settings, ranks)


def load(directory: Path, adapters: dict[str, Path], settings: TrainSettings, ranks: Ranks) -> UsedModel:
    """Weights, and adapters on them, of which the first is in use."""
    model = whole_weights(directory, settings, ranks)
    for name, adapter in adapters.items():
        model = with_adapter(model, name, adapter)
    return in_use(model, settings, ranks)


def in_use(model: Any, settings: TrainSettings, ranks: Ranks) -> UsedModel:
    """Loaded weights and adapters, ready to be asked."""
    return UsedModel(model.eval())


def whole_weights(directory: Path, settings: TrainSettings, ranks: Ranks) -> Any:
    """The model of a directory, without adapters."""
    dtype = compute_dtype(settings, ranks.device)
    options: dict[str, Any] = {"quantization_config": four_bits(dtype)} if settings.use_quant else {}
    model = load_complete(directory, settings.trust_remote_code, dtype=dtype, **options)
    return keep_differentiable(model.to(ranks.device))


def with_adapter(model: Any, name: str, directory: Path) -> Any:
    """The model with one adapter more."""
    from peft import PeftModel

    try:
        if hasattr(model, "peft_config"):
            model.load_adapter(directory, adapter_name=name)
            return model
        return PeftModel.from_pretrained(model, directory, adapter_name=name)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{directory}: no adapter of this model ({error})") from error
