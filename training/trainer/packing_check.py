"""Proof, at the start of every run, that this model trains on what the plan says.

In: the engine's forward pass. Out: nothing, or a `ModelError`. Three facts are checked with a few random tokens:

- the losses computed at target positions only are those of the model's own logits;
- segments before another one in a row do not change its losses: two of them change places, and where attention does not
  leak, the same numbers go through the same kernels, so the difference is 0 in any precision;
- segments packed into one row have the losses they have alone. Here shapes differ, so rounding does too: a pretrained
  model in bfloat16 differs by 0.05 on average and by 0.2 at most, while a leak moves its losses by 1.6 on average.

Cost: six forward passes of 30 tokens. All ranks run the same ones together, as sharded engines need.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.plan.reader import IGNORED, Batch
from training.distributed import Ranks
from training.errors import ModelError
from training.models.loss import MicroBatch, Mode, micro_batch

LENGTHS = (7, 13, 9)
TOLERANCE = 1e-3  # of the largest difference of a token's loss, where nothing is rounded otherwise or little is
COARSE_TOLERANCE = 0.2  # of the mean difference, where bfloat16 is rounded otherwise

Losses = Callable[[MicroBatch, Mode], Tensor]


@dataclass(frozen=True)
class Checked:
    """What the checks depend on."""

    vocabulary: int
    packing: bool
    micro_batch: int
    dtype: torch.dtype


def check(losses_of: Losses, checked: Checked, ranks: Ranks) -> None:
    """Run the checks. All ranks together."""
    rows = min(checked.micro_batch, 2)
    segments = random_segments(checked.vocabulary)
    first, second, last = segments

    def losses(segments: list[np.ndarray], rows: int, mode: Mode = "each") -> Tensor:
        return losses_of(pack([segments] * rows).to(ranks.device), mode).cpu()

    with torch.no_grad():
        ours = losses(segments, rows)
        own = losses(segments, rows, "reference")
        swapped = losses([second, first, last], rows)
        alone = torch.cat([losses([segment], 1) for segment in segments] * rows)
    if not _close(own, ours, checked.dtype):
        raise ModelError(
            f"losses at target positions differ from those of the model's own logits by {_distance(own, ours):.3g}; "
            "this model's output layer does more than a matrix product, please report its model_type"
        )
    if not checked.packing:
        return
    moved = _distance(_of_last(swapped, rows), _of_last(ours, rows))
    if moved > TOLERANCE or not _close(alone, ours, checked.dtype):
        raise ModelError(
            f"the segments of a packed row are not isolated in this model: losses differ by up to "
            f"{max(moved, _distance(alone, ours)):.3g} from those of the segments alone. Use --packing false"
            + (" or --per_gpu_train_batch_size 1" if rows > 1 else "")
        )


def _of_last(losses: Tensor, rows: int) -> Tensor:
    """Losses of the last segment of each row."""
    return losses.view(rows, -1)[:, 1 - LENGTHS[-1] :]


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


def _close(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for rounding, of which a fault of all tokens is told apart by its mean where it is coarse."""
    if dtype == torch.float32:
        return _distance(left, right) <= TOLERANCE
    return float((left - right).abs().mean()) <= COARSE_TOLERANCE


def random_segments(vocabulary: int) -> list[np.ndarray]:
    """Three segments of random ids, the same everywhere."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocabulary, size=length) for length in LENGTHS]


def pack(rows: list[list[np.ndarray]]) -> MicroBatch:
    """Rows of segments, all of the same length, as a micro-batch; all tokens but a segment's first are targets."""
    ids = np.stack([np.concatenate(row) for row in rows]).astype(np.int64)
    positions = np.stack([np.concatenate([np.arange(len(segment)) for segment in row]) for row in rows])
    starts = [list(itertools.accumulate([len(segment) for segment in row[:-1]], initial=0)) for row in rows]
    labels = ids.copy()
    for line, begins in enumerate(starts):
        labels[line, begins] = IGNORED
    batch = Batch(input_ids=ids, labels=labels, position_ids=positions, sources=np.zeros(ids.shape, dtype=np.int8))
    return micro_batch(batch, range(len(rows)))
