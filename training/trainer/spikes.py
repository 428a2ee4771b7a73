"""Spikes: a step whose loss or gradient norm is out of the ordinary, given those of the steps before, and who made it.

**Limits.** In: (loss, gradient norm) of the last `WINDOW` steps. Out: the values above which the next ones are spikes.
The level is the median of the last `LEVEL` steps; a limit is `SIGMAS` spreads above it. The spread is that of the
distances of the steps in the window from the level before each, so that a loss on its way down has no wider one; it is
robust (by the median absolute deviation or the upper tail, but for the last of it, scaled to be sigma of a normal
distribution), so that spikes in the window hardly move it. Norms are compared as logarithms, for they vary by factors.
Looked at upwards only: a loss that falls is no accident. OLMo's `SkipStepOptimizer` does the like with mean and
standard deviation (128 steps, 6 sigma). The numbers are those that all ranks have and checkpoints keep: every rank
decides the same, and a resumed run decides again as before. Cost: 0.1 ms a step.

**Records.** In: the loss a target token of each segment of a row, from the forward pass of training itself. Out: the
segments that stand out, as records in FILE:LINE. Their losses are compared with what was usual: how far segments of the
steps before were from the level of their step, as a histogram that all ranks have and checkpoints keep; the weight of
a step falls by a 1/`WINDOW` with each later one. The distance of a segment with few targets counts for less, for means
of few vary more. In a spike a segment stands out by the spread of the middle half; in any other step also by that of
the upper tail, as sigma of a normal distribution: a corpus with a long tail has records that are hard and not wrong.
One garbage record moves the loss of a step of eight by less than the steps vary, so this is looked at in every step.
Cost: 8 KB in the sum over the ranks that a step makes anyway; the losses of its targets, kept to its end; 0.6 ms for
65,000 of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from data_prep.plan.reader import Plan
from training.distributed import Ranks
from training.models.loss import MicroBatch
from training.run_files import Culprit, Spike

MOST_NAMED = 20
WINDOW = 128
LEVEL = 8
SIGMAS = 6.0
MOST_SAID = 5  # records in one line
LEAST = 32  # steps before which nothing is ordinary yet
SIGMA_OF_MAD, UPPER, SIGMAS_TO_UPPER = 1.4826, 0.975, 1.96  # of a normal distribution
SMALLEST = 1e-300  # a norm of 0 has no logarithm
HIGHEST = 700.0  # logarithm of a number that a float still holds
LEAST_SPREAD = 0.01  # of the loss, relative; of the norm, in logarithms: what repeats exactly has a spread of 0
BIN, NUM_BINS = 1 / 32, 1024  # of distances from the level: from -16 to 16
LEAST_SEGMENTS = 64  # before which nothing is usual yet
FORGOTTEN = 1e-3  # of a segment: it was seen 900 steps ago
SIGMAS_BETWEEN_QUARTILES = 1.349  # of a normal distribution


@dataclass(frozen=True)
class Limits:
    """The largest loss and gradient norm that are ordinary."""

    loss: float = math.inf
    grad_norm: float = math.inf

    def exceeded_by(self, loss: float, grad_norm: float) -> bool:
        return loss > self.loss or grad_norm > self.grad_norm


NO_LIMITS = Limits()


def limits_after(recent: Sequence[tuple[float, float]], share: float = 1.0) -> Limits:
    """Limits of the next step, from (loss, gradient norm) of the steps before it, oldest first.

    :param share: of the rows of a whole step that it has: the last one of an epoch may have few, whose mean varies more
        and whose gradient is longer, both by the root of that
    """
    if len(recent) < LEAST:
        return NO_LIMITS
    losses, norms = np.array(recent[-WINDOW:], np.float64).T
    wider = share**-0.5
    highest = math.log(wider) + _limit(np.log(np.maximum(norms, SMALLEST)), LEAST_SPREAD)
    loss = _limit(losses, LEAST_SPREAD * abs(float(np.median(losses))), wider)
    return Limits(loss, math.exp(min(highest, HIGHEST)))


def _limit(values: np.ndarray, least_spread: float, wider: float = 1.0) -> float:
    levels = np.median(sliding_window_view(values, LEVEL), axis=1)
    return float(levels[-1] + SIGMAS * wider * max(spread(values[LEVEL:] - levels[:-1]), least_spread))


def spread(values: np.ndarray) -> float:
    """Sigma of ``(n,)`` values, were they normal but for a few: from the median absolute deviation or the upper tail.

    The tail but for its last 2.5 %: norms of gradients have a long one, and steps far out in it are no accidents.
    """
    middle, tail = np.quantile(values, (0.5, UPPER))
    return max(SIGMA_OF_MAD * float(np.median(np.abs(values - middle))), float(tail - middle) / SIGMAS_TO_UPPER)


def spike_of(step: int, loss: float, grad_norm: float, limits: Limits, records: list[Culprit]) -> Spike:
    """A spike that is told, and nothing else."""
    return {
        "step": step,
        "loss": loss,
        "loss_limit": limits.loss if limits.loss < math.inf else None,
        "grad_norm": grad_norm,
        "grad_norm_limit": limits.grad_norm if limits.grad_norm < math.inf else None,
        "done": "warned",
        "says": "",
        "records": records,
    }


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


@dataclass(frozen=True)
class SegmentLosses:
    """Segments of rows that have targets: ``(n,)`` arrays."""

    row: np.ndarray  # int64
    number: np.ndarray  # int64, in its row, from 0
    loss: np.ndarray  # float64, mean over its targets
    targets: np.ndarray  # int64

    def where(self, chosen: np.ndarray) -> "SegmentLosses":
        """Those of a mask."""
        return SegmentLosses(self.row[chosen], self.number[chosen], self.loss[chosen], self.targets[chosen])


def losses_of_segments(batches: Sequence[MicroBatch], losses: Sequence[Tensor]) -> SegmentLosses:
    """From micro-batches and the losses of their targets, where these are given; those of a segment stand together."""
    parts = [_of_batch(batch, each.double().cpu().numpy()) for batch, each in zip(batches, losses, strict=False)]
    none = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
    return SegmentLosses(*(np.concatenate(values) for values in zip(none, *parts, strict=True)))


def _of_batch(batch: MicroBatch, losses: np.ndarray) -> tuple[np.ndarray, ...]:
    starts = np.flatnonzero(np.diff(batch.segments, prepend=-1))
    targets = np.diff(starts, append=len(losses))
    line, number = np.divmod(batch.segments[starts], batch.input_ids.shape[1])
    sums = np.add.reduceat(losses, starts) if len(losses) else losses
    return np.array(batch.rows)[line], number, sums / targets, targets


Histogram = list[tuple[int, float]]
"""(Bin, segments in it), without those that are empty. The last one counts targets in place of segments."""


@dataclass(frozen=True)
class Usual:
    """What losses of segments were like in the steps before; nothing stands out where the sigma is not finite."""

    level: float  # the loss of the last steps; nan before the first
    middle: float = 0.0  # of the distances from it
    sigma: float = math.inf  # by their middle half
    tail: float = math.inf  # sigma by their upper tail
    targets: float = 1.0  # of a segment

    def counts(self, found: SegmentLosses) -> np.ndarray:
        """How many segments are so far from the level, and the sum of their targets: ``(NUM_BINS + 1,) float64``."""
        if math.isnan(self.level):
            return np.zeros(NUM_BINS + 1)
        bins = np.clip(self._distances(found) / BIN + NUM_BINS // 2, 0, NUM_BINS - 1).astype(int)
        return np.append(np.bincount(bins, minlength=NUM_BINS), found.targets.sum()).astype(float)

    def exceeded_by(self, found: SegmentLosses, in_spike: bool) -> np.ndarray:
        """Which segments stand out: ``(n,) bool``."""
        if not math.isfinite(self.sigma):
            return np.zeros(len(found.loss), bool)
        sigma = self.sigma if in_spike else max(self.sigma, self.tail)
        return self._distances(found) - self.middle > SIGMAS * sigma

    def _distances(self, found: SegmentLosses) -> np.ndarray:
        """From the level, as of segments that have the usual number of targets: ``(n,) float64``."""
        return (found.loss - self.level) * np.sqrt(np.minimum(1.0, found.targets / self.targets))


def usual_after(recent: Sequence[tuple[float, float]], histogram: Histogram) -> Usual:
    """What is usual in the next step, from (loss, gradient norm) and the segments of the steps before it."""
    if not recent:
        return Usual(math.nan)
    level = float(np.median([loss for loss, _ in recent[-LEVEL:]]))
    counts = _dense(histogram)
    segments, targets = counts[:-1].sum(), counts[-1]
    if segments < LEAST_SEGMENTS:
        return Usual(level, targets=targets / segments if segments else 1.0)
    share = np.cumsum(counts[:-1]) / segments
    edges = (np.arange(1, NUM_BINS + 1) - NUM_BINS // 2) * BIN  # the upper ones
    low, middle, high, upper = np.interp([0.25, 0.5, 0.75, UPPER], share, edges)
    sigma = max((high - low) / SIGMAS_BETWEEN_QUARTILES, LEAST_SPREAD * abs(level), BIN)
    return Usual(level, float(middle), float(sigma), float(upper - middle) / SIGMAS_TO_UPPER, targets / segments)


def with_step(histogram: Histogram, counts: np.ndarray) -> Histogram:
    """The histogram with one more step in it."""
    later = _dense(histogram) * (1 - 1 / WINDOW) + counts
    return [(int(index), float(later[index])) for index in np.flatnonzero(later > FORGOTTEN)]


def _dense(histogram: Histogram) -> np.ndarray:
    counts = np.zeros(NUM_BINS + 1)
    for index, count in histogram:
        counts[index] = count
    return counts


def culprits(plan: Plan, rows: np.ndarray, standing_out: SegmentLosses, ranks: Ranks) -> list[Culprit]:
    """The records of a step that stand out on any rank, worst first. All ranks together.

    :param rows: of the step, on all ranks
    """
    totals = np.zeros((2, int(_num_segments(plan, rows).sum())))
    totals[:, _places(plan, rows, standing_out)] = standing_out.loss, standing_out.targets
    loss, targets = np.array(ranks.sum(*totals.ravel().tolist())).reshape(totals.shape)
    offsets = plan.rows.row_offsets
    segments = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
    worst = [place for place in np.argsort(-loss, kind="stable") if targets[place]]
    named: dict[tuple[int, int], Culprit] = {}  # a record that was cut is named once
    for place in worst:
        record = (int(plan.rows.shard[segments[place]]), int(plan.rows.example[segments[place]]))
        if record not in named:
            named[record] = _culprit(plan, *record, float(loss[place]), int(targets[place]))
        if len(named) == MOST_NAMED:
            break
    return list(named.values())


def _num_segments(plan: Plan, rows: np.ndarray) -> np.ndarray:
    return plan.rows.row_offsets[rows + 1] - plan.rows.row_offsets[rows]


def _places(plan: Plan, rows: np.ndarray, found: SegmentLosses) -> np.ndarray:
    """Where the segments are among those of all rows of the step: ``(n,) int64``."""
    first = np.cumsum(_num_segments(plan, rows)) - _num_segments(plan, rows)
    order = np.argsort(rows)
    return first[order[np.searchsorted(rows[order], found.row)]] + found.number


def _culprit(plan: Plan, shard: int, example: int, loss: float, targets: int) -> Culprit:
    entry = plan.ledger.entry_of(shard, example)
    return {
        "file": entry["file"],
        "line": entry["line"],
        "hash": (entry["hash"] or b"").hex(),
        "loss": loss,
        "target_tokens": targets,
    }
