"""Proof, at the start of every run, that this model trains on what the plan says.

In: the engine's forward pass. Out: nothing, or a `ModelError`. Two facts are checked with a few random tokens:

- segments packed into one row have the losses they have alone (attention does not leak between them);
- the losses computed at target positions only are those of the model's own logits.

Cost: five forward passes of 30 tokens. All ranks run the same ones together, as sharded engines need.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.reader import IGNORED, Batch
from training.errors import ModelError
from training.ranks import Ranks
from training.target_loss import MicroBatch, Mode, micro_batch

LENGTHS = (7, 13, 9)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Absolute, per token. Losses of random tokens are about ln(vocabulary); a leak moves them by 0.1 to 10."""

Losses = Callable[[MicroBatch, Mode], Tensor]


@dataclass(frozen=True)
class Facts:
    """What the checks depend on."""

    vocabulary: int
    packing: bool
    micro_batch: int
    dtype: torch.dtype


def check(losses_of: Losses, facts: Facts, ranks: Ranks) -> None:
    """Run the checks. All ranks together."""
    rows = min(facts.micro_batch, 2)
    segments = random_segments(facts.vocabulary)
    packed = pack([segments] * rows).to(ranks.device)
    with torch.no_grad():
        ours = losses_of(packed, "each").cpu()
        own = losses_of(packed, "reference").cpu()
        alone = [losses_of(pack([[segment]]).to(ranks.device), "each").cpu() for segment in segments]
    if not _close(own, ours, facts.dtype):
        raise ModelError(
            f"losses at target positions differ from those of the model's own logits by {_distance(own, ours):.3g}; "
            "this model's output layer does more than a matrix product, please report its model_type"
        )
    expected = torch.cat(alone * rows)
    if facts.packing and not _close(expected, ours, facts.dtype):
        raise ModelError(
            f"the segments of a packed row are not isolated in this model: losses differ by up to "
            f"{_distance(expected, ours):.3g} from those of the segments alone. Use --packing false"
            + (" or --per_gpu_train_batch_size 1" if rows > 1 else "")
        )


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


def _close(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    return _distance(left, right) <= TOLERANCE[dtype]


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
