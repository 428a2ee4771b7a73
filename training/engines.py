"""The engine that the settings ask for. In: a `TargetLoss`, settings, ranks. Out: an `Engine`.

Cost: the import of the one engine that is asked for.
"""

from torch import nn

from training.engine import Engine
from training.ranks import Ranks
from training.settings import TrainSettings


def build_engine(model: nn.Module, settings: TrainSettings, ranks: Ranks) -> Engine:
    """The engine that the settings ask for, around a `TargetLoss`."""
    if settings.strategy == "fsdp":
        from training.fsdp_engine import FsdpEngine

        return FsdpEngine.build(model, settings, ranks)
    from training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine.build(model, settings, ranks)
