"""Micro-batches of this rank in order, loaded ahead by threads.

In: a plan, and which rows this rank trains on next. Out: `MicroBatch` tensors. Assembling a row costs about 50 us and
releases the interpreter while copying, so a few threads keep ahead of any model; they change the order of nothing.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from data_prep.reader import Plan
from training.target_loss import MicroBatch, micro_batch


def load(plan: Plan, rows: np.ndarray) -> MicroBatch:
    """One micro-batch: rows ``(micro_batch,) int64``, -1 for padding."""
    return micro_batch(plan.batch(rows), rows)


def load_ahead(
    plan: Plan, wanted: Iterable[np.ndarray], num_workers: int, prefetch_factor: int
) -> Iterator[MicroBatch]:
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
