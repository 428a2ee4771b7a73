"""Callbacks for the tests of launching: what goes wrong in the middle of a real training run."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import yaml


def micro_batch(config: str) -> int:
    return yaml.safe_load(Path(config).read_text())["per_gpu_train_batch_size"]


def out_of_memory_above(record: dict[str, Any], config: str, step: int, rows: int) -> None:
    """The error of torch's allocator at a step, unless the micro-batch is small enough."""
    if record["step"] == step and micro_batch(config) > rows:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")


def hang(record: dict[str, Any], step: int) -> None:
    """Never come back from a step."""
    if record["step"] == step:
        time.sleep(300)


def be_killed(record: dict[str, Any], step: int, after: str) -> None:
    """Die as a process does that the kernel or a person kills, once a file is there: a checkpoint is written beside."""
    if record["step"] == step:
        while not Path(after).exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
