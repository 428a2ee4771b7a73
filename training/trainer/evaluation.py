"""Held-out loss and perplexity per source; no logits are kept, memory is that of one micro-batch.

In: a function from a micro-batch to one loss a target token, the rows of a validation plan. Out: `{source: {loss,
perplexity, target_tokens}}` and the same for all sources together under `all`. The ranks share the rows; every rank
makes the same number of forward passes, as sharded engines need.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data_prep.plan.order import split_step
from data_prep.plan.reader import Plan
from training.distributed import Ranks
from training.launch.heartbeat import Heartbeat
from training.models.loss import MicroBatch
from training.run_files import HeldOut, SourceLoss
from training.trainer.batches import prefetch

ALL = "all"
SAMPLE_ROWS = 64


def held_out_losses(
    losses_of: Callable[[MicroBatch], Tensor],
    plan: Plan,
    micro_batch: int,
    ranks: Ranks,
    rows: np.ndarray | None = None,
) -> HeldOut:
    """Mean loss per target token of each source over all rows of the plan, or some.

    `losses_of` is called by all ranks together, and may raise to abandon the evaluation.
    """
    rows = np.arange(plan.num_rows) if rows is None else rows
    mine = split_step(rows, ranks.world_size, micro_batch)[ranks.rank]
    totals = torch.zeros(2, len(plan.sources), dtype=torch.float64)  # summed loss, target tokens
    alive = Heartbeat("evaluation", len(mine), "micro-batches")
    with torch.no_grad():
        for done, batch in enumerate(prefetch(plan, mine, num_workers=1, prefetch_factor=2)):
            alive(done)
            on_device = batch.to(ranks.device)
            losses = losses_of(on_device).double().cpu()
            totals[0].index_add_(0, batch.sources, losses[: len(batch.sources)])
            totals[1] += torch.bincount(batch.sources, minlength=len(plan.sources))
    return summary(np.array(ranks.sum(*totals.flatten().tolist())).reshape(2, -1), plan.sources)


def sample_rows(num_rows: int) -> np.ndarray:
    """Some of so many rows, from all over the plan: ``(<= SAMPLE_ROWS,) int64``."""
    return np.unique(np.linspace(0, num_rows - 1, min(num_rows, SAMPLE_ROWS)).astype(np.int64))


def summary(totals: np.ndarray, sources: list[str]) -> HeldOut:
    """``(2, num_sources) float64`` of summed losses and target tokens -> the documented result."""
    columns = {**{source: totals[:, index] for index, source in enumerate(sources)}, ALL: totals.sum(axis=1)}
    return {source: _entry(*column.tolist()) for source, column in columns.items() if column[1]}


def _entry(loss: float, tokens: float) -> SourceLoss:
    mean = loss / tokens
    return {"loss": mean, "perplexity": math.exp(min(mean, 700)), "target_tokens": int(tokens)}
