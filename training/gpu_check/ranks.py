"""What every rank of the check of communication runs: ``python -m training.gpu_check.ranks --config RUN/config.yaml``.

In: the environment of a rank. Out: RUN/ranks.json of rank 0: backend, whether sums and gathered parts are right, bytes
a second of a large sum. Cost: seconds.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist

from training import run_files
from training.distributed import join, leave, this_rank
from training.gpu_check.device import synchronize
from training.launch.exits import run_rank

FILE = "ranks.json"
SUMMED_BYTES = {"cuda": 256 << 20, "cpu": 1 << 20}
TIMES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    run_dir = parser.parse_args().config.parent
    ranks = this_rank()
    join(ranks)
    try:
        numbers = torch.full((SUMMED_BYTES[ranks.device.type] // 4,), float(ranks.rank + 1), device=ranks.device)
        parts = torch.empty(ranks.world_size, device=ranks.device)
        dist.all_gather_into_tensor(parts, torch.tensor([float(ranks.rank)], device=ranks.device))
        dist.all_reduce(numbers)
        right = float(numbers[0]) == ranks.world_size * (ranks.world_size + 1) / 2
        right &= parts.tolist() == [float(rank) for rank in range(ranks.world_size)]
        synchronize(ranks.device)
        began = time.perf_counter()
        for _ in range(TIMES):
            dist.all_reduce(numbers)
        synchronize(ranks.device)
        seconds = (time.perf_counter() - began) / TIMES
        if ranks.is_first:
            passed_on = 2 * (ranks.world_size - 1) / ranks.world_size * numbers.nbytes
            backend = "nccl" if ranks.device.type == "cuda" else "gloo"
            found = {"backend": backend, "right": right, "bytes_per_second": passed_on / seconds}
            run_files.write_json(run_dir / FILE, found)
    finally:
        leave()


if __name__ == "__main__":
    run_rank(main)
