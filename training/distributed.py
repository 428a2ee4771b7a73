"""The processes that train together: who this rank is, and the few numbers they agree on.

In: the environment variables RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (set by the launcher, torchrun or
by hand). Out: `Ranks`. Numbers travel over gloo on the CPU, in float64, whatever the device of the model: agreeing
costs 0.1 to 0.3 ms on one machine and never waits for the GPU. Gradients travel over NCCL where there are GPUs. All of
them listen only on the interface that MASTER_ADDR names (`training/rendezvous.py`).
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from training.errors import DeviceError
from training.rendezvous import listen_beside, meet

PATIENCE = 3  # times `stall_seconds`: how long a rank waits for the others, should nobody look after it
SHORTEST_WAIT = 120.0  # ranks do not start in the same moment
FOR_EVER = 365 * 24 * 3600.0
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        """Each value's maximum over the ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        self.sum(0.0)

    def _reduced(self, values: tuple[float, ...], operation: Any) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, op=operation)
        return numbers.tolist()


def this_rank() -> Ranks:
    """The rank that the environment describes; a process started alone is rank 0 of 1.

    :raises DeviceError: there is no GPU left for it.
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    rank = int(os.environ.setdefault("RANK", "0"))
    world_size = int(os.environ.setdefault("WORLD_SIZE", "1"))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500" if world_size > 1 else "0")  # alone: any free port
    return Ranks(rank, local_rank, world_size, _device(local_rank))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise DeviceError(
            f"rank {local_rank} of this machine has no GPU: there are {num_gpus}. Start at most as many ranks "
            f"(--num_processes {num_gpus}), or show more in CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", local_rank)


def join(ranks: Ranks, stall_seconds: float = 600) -> None:
    """Meet the other ranks (waits for all of them).

    Who launches ranks sees that one is silent and ends those of its machine. On a machine that has only an agent, or
    whose launcher sees no events, nobody does: there a rank whose peers have gone without a word stops waiting.
    """
    timeout = timedelta(seconds=max(PATIENCE * stall_seconds, SHORTEST_WAIT) if stall_seconds else FOR_EVER)
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listen_beside(address)
    hosted = os.environ.get(AGENT_STORE) == "True"  # by torchrun's agent, which torch then finds by itself
    store = None if hosted else meet(address, port, ranks.world_size, ranks.is_first, timeout)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
