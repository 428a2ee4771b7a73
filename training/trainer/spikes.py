"""Spikes: a step whose loss or gradient norm is out of the ordinary, given those of the steps before, and who made it.

**Limits.** In: (loss, gradient norm) of the last `WINDOW` steps. Out: the values above which the next ones are spikes.
The level is the median of the last `LEVEL` steps; a limit is `SIGMAS` spreads above it. The spread is that of the
distances of the steps in the window from the level before each, so that a loss on its way down has no wider one; it is
robust (the median absolute deviation, scaled to be sigma of a normal distribution), so that spikes in the window hardly
move it. Norms are compared as logarithms, for they vary by factors. Looked at upwards only: a loss that falls is no
accident. OLMo's `SkipStepOptimizer` does the like with mean and standard deviation (128 steps, 6 sigma). The numbers
are those that all ranks have and checkpoints keep: every rank decides the same, and a resumed run decides again as
before. Cost: 0.1 ms a step.

**Culprits.** In: the step, an engine with the weights of the moment. Out: the records of the step whose loss per target
token stands out from the records of about as many rows before it, by the same measure; that is wider for records with
few targets, whose means vary more. A record that was cut over several segments counts once. The ranks share the
rows. Cost: a forward pass of the step and of the rows before it, and an all-reduce of two numbers a segment; only where
there is a spike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from data_prep.plan.order import split_step
from data_prep.plan.reader import Plan
from training.distributed import Ranks
from training.engines.engine import Engine
from training.launch.heartbeat import Heartbeat
from training.models.loss import MicroBatch
from training.run_files import Culprit, Spike
from training.trainer.batches import BatchSchedule, prefetch

EARLIER_ROWS = (128, 256)  # as many as the step has, within these
MOST_NAMED = 20
WINDOW = 128
LEVEL = 8
SIGMAS = 6.0
MOST_SAID = 5  # records in one line
LEAST = 32  # steps before which nothing is ordinary yet
SIGMA_OF_MAD = 1.4826  # of a normal distribution
SMALLEST = 1e-300  # a norm of 0 has no logarithm
HIGHEST = 700.0  # logarithm of a number that a float still holds
LEAST_SPREAD = 0.01  # of the loss, relative; of the norm, in logarithms: what repeats exactly has a spread of 0


@dataclass(frozen=True)
class Limits:
    """The largest loss and gradient norm that are ordinary."""

    loss: float = math.inf
    grad_norm: float = math.inf

    def exceeded_by(self, loss: float, grad_norm: float) -> bool:
        return loss > self.loss or grad_norm > self.grad_norm


NO_LIMITS = Limits()


def limits_after(recent: Sequence[tuple[float, float]]) -> Limits:
    """Limits of the next step, from (loss, gradient norm) of the steps before it, oldest first."""
    if len(recent) < LEAST:
        return NO_LIMITS
    losses, norms = np.array(recent[-WINDOW:], np.float64).T
    highest = _limit(np.log(np.maximum(norms, SMALLEST)), LEAST_SPREAD)
    return Limits(_limit(losses, LEAST_SPREAD * abs(float(np.median(losses)))), math.exp(min(highest, HIGHEST)))


def _limit(values: np.ndarray, least_spread: float) -> float:
    levels = np.median(sliding_window_view(values, LEVEL), axis=1)
    return float(levels[-1] + SIGMAS * max(spread(values[LEVEL:] - levels[:-1]), least_spread))


def spread(values: np.ndarray) -> float:
    """Sigma of ``(n,)`` values, were they normal but for a few: from the median absolute deviation."""
    return SIGMA_OF_MAD * float(np.median(np.abs(values - np.median(values))))


def in_words(spike: Spike) -> str:
    """``loss 6.2 (limit 3.1); no update was made``."""
    measured = (
        ("loss", spike["loss"], spike["loss_limit"]),
        ("gradient norm", spike["grad_norm"], spike["grad_norm_limit"]),
    )
    above = [
        f"{what} {value:.4g} (limit {limit:.4g})"
        for what, value, limit in measured
        if limit is not None and value > limit
    ]
    done = {
        "warned": "it was trained on all the same",
        "skipped": "no update was made",
        "rewound": f"gone back to the checkpoint of step {spike.get('back_to')}",
    }
    return f"{' and '.join(above)}; {done[spike['done']]}"


def names(records: Sequence[Culprit]) -> str:
    """The first of them, with their losses."""
    named = ", ".join(f"{one['file']}:{one['line']} ({one['loss']:.2f})" for one in records[:MOST_SAID])
    more = f" and {len(records) - MOST_SAID} more" if len(records) > MOST_SAID else ""
    return f"records that stand out, with their losses: {named}{more}" if named else "no record stands out"


def culprits(engine: Engine, batches: BatchSchedule, step: int, micro_batch: int) -> list[Culprit]:
    """The records of a step (counted from 0) that stand out, worst first. All ranks together."""
    rows, earlier = batches.rows(step), rows_before(batches, step)
    module = engine.module
    module.eval()
    found, usual = (losses_of_records(engine, batches.plan, part, micro_batch) for part in (rows, earlier))
    module.train()
    worst = [number for number in np.argsort(-found.loss, kind="stable") if stands_out(found, int(number), usual)]
    return [_culprit(batches.plan, found, int(number)) for number in worst[:MOST_NAMED]]


@dataclass(frozen=True)
class Records:
    """The records in some rows, in the order in which they come: ``(n,)`` arrays."""

    shard: np.ndarray  # int32
    example: np.ndarray  # int32
    loss: np.ndarray  # float64, mean over its targets
    targets: np.ndarray  # int64, more than 0


def rows_before(batches: BatchSchedule, step: int) -> np.ndarray:
    """The last rows that were trained on before a step, about as many: ``(n,) int64``."""
    least, most = EARLIER_ROWS
    wanted = min(max(len(batches.rows(step)), least), most)
    earlier: list[np.ndarray] = []
    while step > 0 and sum(map(len, earlier)) < wanted:
        step -= 1
        earlier.append(batches.rows(step))
    return np.concatenate(earlier)[:wanted] if earlier else np.zeros(0, np.int64)


def losses_of_records(engine: Engine, plan: Plan, rows: np.ndarray, micro_batch: int) -> Records:
    """The loss of every record in the rows, with the weights of the moment. All ranks together."""
    ranks = engine.ranks
    first = np.concatenate([[0], np.cumsum(np.diff(plan.rows.row_offsets)[rows])])  # segment of each row among all
    place = {int(row): int(at) for row, at in zip(rows, first[:-1], strict=True)}
    mine = split_step(rows, ranks.world_size, micro_batch)[ranks.rank]
    totals = np.zeros((2, int(first[-1])))  # summed loss and targets of each segment
    alive = Heartbeat("looking for the records of a spike", len(mine), "micro-batches")
    with torch.no_grad():
        for done, batch in enumerate(prefetch(plan, mine, num_workers=1, prefetch_factor=2)):
            alive(done)
            losses = engine.forward(batch.to(ranks.device), "each").double().cpu().numpy()
            segments = segments_of_targets(batch, place)
            np.add.at(totals[0], segments, losses[: len(segments)])
            np.add.at(totals[1], segments, 1)
    return _by_record(plan, rows, _summed(totals, ranks))


def segments_of_targets(batch: MicroBatch, place: dict[int, int]) -> np.ndarray:
    """Of each target the number of its segment: ``(num_targets,) int64``; `place`: row -> number of its first one."""
    starts = (batch.position_ids == 0).numpy()
    inside = np.cumsum(starts, axis=1) - 1  # a row begins at position 0
    first = np.array([place.get(row, 0) for row in batch.rows])  # padding has no targets
    return (inside + first[:, None]).ravel()[batch.predictors.numpy()]


def _summed(totals: np.ndarray, ranks: Ranks) -> np.ndarray:
    return np.array(ranks.sum(*totals.ravel().tolist())).reshape(totals.shape)


def _by_record(plan: Plan, rows: np.ndarray, totals: np.ndarray) -> Records:
    """Segments of one record added up; those without targets left out."""
    offsets = plan.rows.row_offsets
    segments = np.concatenate([np.zeros(0, int), *(np.arange(offsets[row], offsets[row + 1]) for row in rows)])
    keys = np.stack([plan.rows.shard[segments], plan.rows.example[segments]])
    keys, first, which = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    loss, targets = (np.bincount(which.ravel(), weights=part, minlength=len(first)) for part in totals)
    order = np.argsort(first)
    order = order[targets[order] > 0]
    return Records(keys[0, order], keys[1, order], loss[order] / targets[order], targets[order].astype(np.int64))


def stands_out(found: Records, number: int, usual: Records) -> bool:
    """Whether the loss of a record is more than `SIGMAS` spreads above the usual one."""
    if not len(usual.loss):
        return False
    middle, length = np.median(usual.loss), np.median(usual.targets)
    sigma = max(spread(usual.loss), LEAST_SPREAD * middle)
    return bool(found.loss[number] > middle + SIGMAS * sigma * max(1.0, length / found.targets[number]) ** 0.5)


def _culprit(plan: Plan, found: Records, number: int) -> Culprit:
    entry = plan.ledger.entry_of(int(found.shard[number]), int(found.example[number]))
    return {
        "file": entry["file"],
        "line": entry["line"],
        "hash": (entry["hash"] or b"").hex(),
        "loss": float(found.loss[number]),
        "target_tokens": int(found.targets[number]),
    }
