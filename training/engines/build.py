"""The engine that the settings ask for. In: a `CausalLMLoss`, settings, ranks. Out: an `Engine`.

Cost: the import of the one engine that is asked for.
"""

from training.distributed import Ranks
from training.engines.engine import Engine, decoder_layers
from training.models.deferred import Values
from training.models.loss import CausalLMLoss
from training.settings import TrainSettings


def build_engine(model: CausalLMLoss, settings: TrainSettings, ranks: Ranks, values: Values | None = None) -> Engine:
    """The engine that the settings ask for, around a `CausalLMLoss`; `values`: of what is still empty in it."""
    values = Values() if values is None else values
    if settings.compile:
        for layer in decoder_layers(model):
            layer.compile()
    if settings.strategy == "fsdp":
        from training.engines.fsdp import FsdpEngine

        return FsdpEngine.build(model, settings, ranks, values)
    from training.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine.build(model, settings, ranks, values)
