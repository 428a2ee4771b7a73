"""A deployed model on the ranks that meet, for losses and texts: sharded by FSDP2 where there are several.

In: the directory that `save_model` wrote (a whole model, or an adapter and its base), the settings it was trained with,
ranks that have met. Out: a `UsedModel` to call under `torch.no_grad()`; with several ranks all call it together,
equally often, each with rows of its own. The base is in 4 bits if it was in training. Several adapters of one base can
be put on it before it is shared out (`training.models.build.put_adapter`), and switched. Cost: each rank reads its
shards from the files, and holds these and two layers; one rank alone holds one copy, on its device. A token of a text
needs all weights: over several ranks each gathers them, layer by layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method

from training.devices import compute_dtype
from training.distributed import Ranks
from training.engines.fsdp import shard
from training.launch.heartbeat import Heartbeat
from training.models.build import Empty, empty_deployed
from training.models.deferred import check_filled
from training.models.loss import CausalLMLoss
from training.settings import TrainSettings


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


def load_for_inference(
    directory: Path, settings: TrainSettings, ranks: Ranks, base_dir: Path | None = None
) -> UsedModel:
    """The model of `directory`, in evaluation mode, on the ranks. `base_dir`: where an adapter's base is now."""
    dtype, trusted = compute_dtype(settings, ranks.device), settings.trust_remote_code
    return in_use(empty_deployed(directory, dtype, base_dir, settings.use_quant, trusted), ranks)


def in_use(empty: Empty, ranks: Ranks) -> UsedModel:
    """A model with its adapters, filled and ready to be asked."""
    module: Any = UsedModel(empty.model.requires_grad_(False)).eval()
    if ranks.world_size > 1:
        shard(module, ranks, empty.values, MixedPrecisionPolicy())  # as it is: the numbers of one rank
        register_fsdp_forward_method(module, "generate")
        module.register_forward_hook(lambda *_: module.reshard())  # it waits for a backward pass, gathered
    else:
        empty.values.fill(ranks.device, Heartbeat("loading the model", len(empty.values), "tensors"))
        module.to(ranks.device)
    check_filled(module)
    return module
