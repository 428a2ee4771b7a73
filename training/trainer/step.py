"""One optimizer step as plain functions: they run on a CPU with a tiny model and no launcher.

In: an engine, the micro-batches of this rank, the number of target tokens of the *whole global batch* (known from the
plan, nothing is gathered for it). Out: the loss, the gradient norm, updated weights. The loss of a step is::

    sum of cross-entropy over the targets of all micro-batches of all ranks / number of those targets

so it does not depend on how the global batch is split into micro-batches, accumulation and ranks. Engines average
gradients over the ranks: multiplying the loss by `engine.averaging` undoes that. A number that is not finite raises
`NotFinite` before the update; one above its limit means that there is no update.

Dropout is seeded for every micro-batch from (seed, step, its rows): a resumed run needs no generator state, and a
micro-batch drops the same numbers on whatever rank it runs.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from torch import Tensor

from training.distributed import Ranks
from training.engines.engine import Engine
from training.models.loss import MicroBatch
from training.trainer.metrics import Clock
from training.trainer.spikes import NO_LIMITS, Limits, SegmentLosses, Usual, losses_of_segments

NEVER = -1.0  # a limit that every gradient norm exceeds


class NotFinite(ArithmeticError):
    """Loss or gradient norm is inf or nan; no update was made. `rows`: where, on this rank; empty = on another rank."""

    def __init__(self, what: str, value: float, rows: list[int]):
        self.what, self.value, self.rows = what, value, rows
        super().__init__(f"{what} is {value}")


@dataclass
class Accumulated:
    """What forward and backward of a step leave behind on this rank."""

    losses: list[Tensor] = field(default_factory=list)  # summed cross-entropy of each micro-batch, scalars
    each: list[Tensor] = field(default_factory=list)  # those of its targets
    batches: list[MicroBatch] = field(default_factory=list)
    num_computed: int = 0  # tokens that went through the model, padding included


@dataclass(frozen=True)
class StepWork:
    """What a step has to do, known before it begins."""

    step: int  # from 0
    seed: int
    num_micro_steps: int  # the same on every rank
    target_tokens: int  # of the whole global batch
    learning_rate: float
    limits: Limits = NO_LIMITS
    usual: Usual | None = None  # None: nobody looks at single segments


@dataclass(frozen=True)
class Looked:
    """What the segments of a step were like."""

    usual: Usual
    counts: np.ndarray  # of `usual`, over all ranks
    num_standing_out: int  # on all ranks
    segments: SegmentLosses  # of this rank


@dataclass(frozen=True)
class StepResult:
    """What is known of a step on every rank."""

    loss: float  # per target token of the global batch
    grad_norm: float  # of the whole gradient, before clipping
    num_computed: int  # tokens that went through the model on all ranks, padding included
    looked: Looked | None  # None: nobody did


def train_step(
    engine: Engine,
    batches: Iterator[MicroBatch],
    work: StepWork,
    clock: Clock,
    before: Callable[[int], None] = lambda index: None,
) -> StepResult:
    """Accumulate gradients, check, update if loss and gradient norm are within their limits. All ranks together.

    `before` runs ahead of every micro-batch, with its index, and may raise to abandon the step.
    """
    done = accumulate(engine, batches, work, clock, before)
    total, computed, looked = _agree(done, engine.ranks, work.usual)
    loss, limits = total / work.target_tokens, work.limits
    with clock.span("step"):
        grad_norm = engine.step(work.learning_rate, limits.grad_norm if loss <= limits.loss else NEVER)
    if not math.isfinite(grad_norm):
        raise NotFinite("the gradient norm", grad_norm, [row for batch in done.batches for row in batch.rows])
    return StepResult(loss, grad_norm, int(computed), looked)


def accumulate(
    engine: Engine, batches: Iterator[MicroBatch], work: StepWork, clock: Clock, before: Callable[[int], None]
) -> Accumulated:
    """Forward and backward of the next micro-batches of this rank."""
    done, scale = Accumulated(), engine.averaging / work.target_tokens
    for index in range(work.num_micro_steps):
        before(index)
        with clock.span("data"):
            batch = next(batches)
        seed_dropout(work.seed, work.step, batch.rows)
        with clock.span("forward"):
            loss, each = engine.forward(batch)
        with clock.span("backward"):
            engine.backward(loss * scale, last=index == work.num_micro_steps - 1)
        done.losses.append(loss.detach())
        done.each.append(each)
        done.batches.append(batch)
        done.num_computed += batch.input_ids.numel()
    return done


def seed_dropout(seed: int, step: int, rows: tuple[int, ...]) -> None:
    """Random numbers of a micro-batch depend on (seed, step, rows) and on nothing else."""
    torch.manual_seed(xxhash.xxh3_64_intdigest(repr((seed, step, rows)).encode()) >> 1)


def _agree(done: Accumulated, ranks: Ranks, usual: Usual | None) -> tuple[float, float, Looked | None]:
    """(Summed loss, tokens computed, what the segments were like), over all ranks.

    :raises NotFinite: on every rank, when any rank's loss is not finite.
    """
    losses = [float(loss) for loss in done.losses]  # waits for the GPU, once a step
    bad = next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), None)
    total = math.fsum(losses) if bad is None else 0.0
    mine = losses_of_segments(done.batches, done.each if usual and bad is None else [])
    number = float(usual.exceeded_by(mine, in_spike=False).sum()) if usual else 0.0
    counts = usual.counts(mine).tolist() if usual else []
    total, computed, num_bad, number, *counts = ranks.sum(
        total, float(done.num_computed), float(bad is not None), number, *counts
    )
    if bad is not None:
        raise NotFinite("the loss", losses[bad], list(done.batches[bad].rows))
    if num_bad:
        raise NotFinite("the loss of another rank", math.nan, [])
    return total, computed, Looked(usual, np.array(counts), int(number), mine) if usual else None
