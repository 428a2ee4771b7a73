"""Which rows each step trains on, known before the first one, and the same rows as tensors, loaded ahead by threads.

In: plan, settings, number of ranks. Out: steps, rows and target tokens of every step; `MicroBatch` tensors of this
rank, in order. The schedule is a pure function, so resuming is a seek and the rows of a step are the same on any number
of ranks. `rows_per_step` is fixed when a run starts (micro-batch x accumulation x ranks); a resumed run keeps it
whatever its ranks and micro-batch are then. Cost: assembling a row takes about 50 us and releases the interpreter while
copying, so a few threads keep ahead of any model; they change the order of nothing.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.plan.order import rows_of_step, split_step, steps_per_epoch
from data_prep.plan.reader import Plan
from training.models.loss import MicroBatch, micro_batch
from training.settings import BatchSettings


@dataclass(frozen=True)
class BatchSchedule:
    """Steps are counted from 0 over all epochs; the last step of an epoch may have fewer rows."""

    plan: Plan
    rows_per_step: int
    seed: int
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.plan.num_rows, self.rows_per_step)

    def rows(self, step: int) -> np.ndarray:
        """Rows of a step: ``(<= rows_per_step,) int64``."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return rows_of_step(self.plan.num_rows, self.rows_per_step, self.seed, epoch, step_in_epoch)

    def target_tokens(self, step: int) -> int:
        """Target tokens of the whole global batch: what the loss of the step is divided by."""
        return int(self.plan.row_target_tokens[self.rows(step)].sum())

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch: int) -> np.ndarray:
        """Rows of one rank: ``(micro_steps, micro_batch) int64``, -1 for padding."""
        return split_step(self.rows(step), world_size, micro_batch)[rank]

    def wanted(self, first_step: int, rank: int, world_size: int, micro_batch: int) -> Iterator[np.ndarray]:
        """Rows of every micro-batch of a rank from a step on, in order."""
        for step in range(first_step, self.total_steps):
            yield from self.micro_batches(step, rank, world_size, micro_batch)


def batch_schedule(
    plan: Plan, settings: BatchSettings, world_size: int, rows_per_step: int | None = None
) -> BatchSchedule:
    """The schedule that the settings describe; `rows_per_step` of a run that is resumed."""
    rows = rows_per_step or settings.rows_per_step(world_size)
    return BatchSchedule(plan, rows, settings.seed, settings.total_steps(steps_per_epoch(plan.num_rows, rows)))


def load(plan: Plan, rows: np.ndarray) -> MicroBatch:
    """One micro-batch: rows ``(micro_batch,) int64``, -1 for padding."""
    batch = micro_batch(plan.batch(rows), rows)
    return batch.pinned() if torch.cuda.is_available() else batch


def prefetch(plan: Plan, wanted: Iterable[np.ndarray], num_workers: int, prefetch_factor: int) -> Iterator[MicroBatch]:
    """The micro-batches of `wanted`, in its order; `num_workers` threads keep `prefetch_factor` each ready."""
    if not num_workers:
        yield from (load(plan, rows) for rows in wanted)
        return
    pending: deque[Future[MicroBatch]] = deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="rows") as pool:
        try:
            for rows in wanted:
                pending.append(pool.submit(load, plan, rows))
                if len(pending) > num_workers * prefetch_factor:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
