"""Packing of whole examples: rows and seconds, against the fewest rows there could be and against TRL.

In: a number of examples, whose lengths are drawn log-normally (median 200 tokens) as in instruction corpora. Out: rows
of 2,048 and seconds for ours; for TRL's `pack_dataset` too where it is installed (the extra `bench`), in its default
batches of 1,000 examples and in one batch. Cost: a minute.

    python -m benchmarks.packing --examples 200000
"""

import argparse
import importlib.util
import time

import numpy as np

from benchmarks.rows import Row, say
from data_prep.plan.pack import best_fit_decreasing

CAPACITY = 2048


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=200_000)
    number = parser.parse_args().examples
    lengths = np.random.default_rng(0).lognormal(np.log(200), 1.0, number).astype(np.int64).clip(1, CAPACITY)
    began = time.perf_counter()
    rows = int(best_fit_decreasing(lengths, CAPACITY).max()) + 1
    seconds = time.perf_counter() - began
    what = f"rows for {number:,} examples"
    say(Row(what, rows, "fewest possible", int(-(-lengths.sum() // CAPACITY)), "rows", at_most=1.001))
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed: pip install -e '.[bench]'")
        return
    for called, batch in (("TRL, its default batches", 1000), ("TRL, in one batch", number)):
        theirs, took = packed_by_trl(lengths, batch)
        say(Row(what, rows, called, theirs, "rows", at_most=1.0))
        say(Row(f"packing {number:,} examples", seconds, called, took, "s", at_most=1.0))


def packed_by_trl(lengths: np.ndarray, batch: int) -> tuple[int, float]:
    """(Rows, seconds) of TRL's best fit decreasing."""
    from datasets import Dataset
    from trl import pack_dataset

    examples = Dataset.from_dict({"input_ids": [np.zeros(length, np.int32) for length in lengths]})
    began = time.perf_counter()
    packed = pack_dataset(examples, seq_length=CAPACITY, strategy="bfd", map_kwargs={"batch_size": batch})
    return len(packed), time.perf_counter() - began


if __name__ == "__main__":
    main()
