"""A deployed model on the ranks that meet, for losses without gradients: sharded by FSDP2 where there are several.

In: the directory that `save_model` wrote (a whole model, or an adapter and its base), the settings it was trained with,
ranks that have met. Out: a `CausalLMLoss` to call under `torch.no_grad()`; with several ranks all call it together,
equally often, each with rows of its own. The base is in 4 bits if it was in training. Cost: each rank reads its shards
from the files, and holds these and two layers; one rank alone holds one copy, on its device.
"""

from pathlib import Path
from typing import Any

from torch.distributed.fsdp import MixedPrecisionPolicy

from training.devices import compute_dtype
from training.distributed import Ranks
from training.engines.fsdp import shard
from training.models.build import empty_deployed
from training.models.deferred import check_filled
from training.models.loss import CausalLMLoss
from training.settings import TrainSettings


def load_for_inference(
    directory: Path, settings: TrainSettings, ranks: Ranks, base_dir: Path | None = None
) -> CausalLMLoss:
    """The model of `directory`, in evaluation mode, on the ranks. `base_dir`: where an adapter's base is now."""
    model, values = empty_deployed(directory, compute_dtype(settings, ranks.device), base_dir, settings)
    module: Any = CausalLMLoss(model.requires_grad_(False)).eval()
    if ranks.world_size > 1:
        shard(module, ranks, values, MixedPrecisionPolicy())  # as it is: the numbers of one rank
        module.register_forward_hook(lambda *_: module.reshard())  # it waits for a backward pass, gathered
    else:
        values.fill(ranks.device)
        module.to(ranks.device)
    check_filled(module)
    return module
