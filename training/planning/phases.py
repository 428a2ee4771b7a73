"""What each part of a run needs on a rank, from loading to export, and the smallest change that makes all of it fit.

In: `ModelShape`, the training settings, what the ranks run on. Out: `Phase`s in the order of a run; changes of
settings. Pure arithmetic around the step of `memory.py`. What is taken for granted: each rank reads its own slices of
the weights, tensor by tensor, or draws them so, but makes some models from scratch whole (`training.models.drawn`);
evaluation after training uses the weights in memory; a checkpoint is a copy of a rank's part in CPU memory, written
beside the training; the model is written shard by shard; the gate loads models one after the other, shared out over the
ranks of one machine.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from training.models.drawn import KINDS
from training.models.loss import CHUNK_ELEMENTS
from training.planning import compatibility
from training.planning.hardware import Hardware
from training.planning.memory import CHECKPOINT_BYTES, FLOAT32, NF4_BYTES, Memory, estimate
from training.planning.model_shape import ModelShape
from training.settings import TrainSettings


@dataclass(frozen=True)
class Phase:
    """Bytes of a rank: on its device, and beside it in CPU memory. A CPU rank has all of it in one."""

    name: str
    device: float
    host: float = 0.0

    def fits(self, hardware: Hardware) -> bool:
        return hardware.fits(self.device) and hardware.host_fits(self.host)


def phases(shape: ModelShape, settings: TrainSettings, hardware: Hardware) -> list[Phase]:
    """Every part of a run that holds weights."""
    step = estimate(shape, settings, hardware)
    held = step.weights + step.optimizer + step.engine  # between two steps
    tensor = max(shape.largest_matrix, shape.vocabulary * shape.hidden_size) * FLOAT32
    copy = shape.trainable * CHECKPOINT_BYTES / hardware.ranks
    offloaded = step.host - (copy if hardware.is_gpu else 0)  # a step may find the copy still being written
    looked_at = _evaluation_bytes(shape, settings)
    kind = (settings.architecture or {}).get("model_type")
    from_scratch = settings.ckpt_path is None and settings.architecture is not None
    whole = from_scratch and kind not in KINDS  # made by every rank, in CPU memory, before it is cut up
    made = shape.parameters * FLOAT32 if whole else tensor
    loaded = hardware.with_overhead(step.weights + tensor if hardware.is_gpu else max(step.weights, made) + tensor)
    return [
        _phase("load", loaded, offloaded + (made if hardware.is_gpu else 0), hardware),
        Phase("train", step.total, step.host),
        Phase("evaluate", held + looked_at, offloaded),
        _phase("save", held, offloaded + copy, hardware),
        _phase("export", held + tensor, offloaded + tensor, hardware),
        Phase("gate", hardware.with_overhead(_used_bytes(shape, hardware) + looked_at)),
    ]


def _phase(name: str, device: float, host: float, hardware: Hardware) -> Phase:
    return Phase(name, device, host) if hardware.is_gpu else Phase(name, device + host)


def _evaluation_bytes(shape: ModelShape, settings: TrainSettings) -> float:
    """A layer at a time, nothing is kept for a backward pass; a chunk of logits, and its normaliser."""
    rows = settings.per_gpu_eval_batch_size
    whole = rows * shape.num_tokens * shape.vocabulary
    elements = min(whole, max(CHUNK_ELEMENTS, shape.vocabulary)) if shape.plain_head else whole
    return rows * shape.layer_bytes + 2 * elements * FLOAT32


def _used_bytes(shape: ModelShape, hardware: Hardware) -> float:
    """Weights of a model that is only used, and the layer that is gathered where several ranks share them."""
    whole = (shape.parameters - shape.quantised) * hardware.element_bytes
    packed, constants = shape.quantised / 2, shape.quantised * (NF4_BYTES - 0.5)
    if hardware.ranks_here == 1:
        return whole + packed + constants
    gathered = max(shape.largest_layer, shape.vocabulary * shape.hidden_size) * hardware.element_bytes
    return (whole + packed) / hardware.ranks_here + constants + 2 * gathered


def too_large(shape: ModelShape, settings: TrainSettings, hardware: Hardware) -> list[Phase]:
    """The phases that a rank has no room for."""
    return [phase for phase in phases(shape, settings, hardware) if not phase.fits(hardware)]


Values = dict[str, bool | int | str]
"""Settings by name, as they are to be."""


@dataclass(frozen=True)
class Change:
    """A way to need less memory. `cost`: what is given up, from nothing (1) to another kind of training (32)."""

    name: str
    cost: int
    values: Callable[[TrainSettings], Values]


@dataclass(frozen=True)
class Fitting:
    """Changed settings with which every phase fits, and what a step needs with them."""

    settings: Values
    memory: Memory


def _one_row_at_a_time(settings: TrainSettings) -> Values:
    """The same rows in a step, one at a time: the same loss."""
    rows = settings.per_gpu_train_batch_size
    return {"per_gpu_train_batch_size": 1, "gradient_accumulation_steps": settings.gradient_accumulation_steps * rows}


CHANGES = (
    Change("evaluation batch", 1, lambda s: {"per_gpu_eval_batch_size": 1}),
    Change("batch", 1, _one_row_at_a_time),
    Change("checkpointing", 2, lambda s: {"gradient_checkpointing": True}),
    Change("zero 3", 4, lambda s: {"strategy": "deepspeed", "zero_stage": 3}),
    Change("offload optimizer", 6, lambda s: {"offload_optimizer": True}),
    Change("offload parameters", 9, lambda s: {"strategy": "deepspeed", "zero_stage": 3, "offload_parameters": True}),
    Change("lora", 16, lambda s: {"use_lora": True}),
    Change("qlora", 32, lambda s: {"use_lora": True, "use_quant": True}),
)


def fitting_change(  # all that decides what fits
    shapes: Callable[[TrainSettings], ModelShape],
    settings: TrainSettings,
    hardware: Hardware,
    model_config: dict[str, Any] | None,
    packing: bool,
) -> Fitting | None:
    """The cheapest set of changed settings with which every phase fits; None when there is none."""
    for values in _candidates(settings):
        changed = settings.model_copy(update=values)
        if compatibility.problems(changed, model_config, packing):
            continue
        shape = shapes(changed)
        if not too_large(shape, changed, hardware):
            different = {name: value for name, value in values.items() if value != getattr(settings, name)}
            return Fitting(different, estimate(shape, changed, hardware))
    return None


def _candidates(settings: TrainSettings) -> Iterator[Values]:
    """Combinations of changes, the cheapest first."""
    sets = [chosen for size in range(1, 5) for chosen in itertools.combinations(CHANGES, size)]
    for chosen in sorted(sets, key=lambda chosen: sum(change.cost for change in chosen)):
        values: Values = {}
        for change in chosen:
            values |= change.values(settings)
        yield values
