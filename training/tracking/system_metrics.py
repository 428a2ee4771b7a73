"""Sample the load of this machine into RUN/system.jsonl, in a thread, under the names of MLflow's system metrics.

In: a run directory. Out: one JSON line every ten seconds: CPU, memory, disk, network, GPUs through nvidia-smi where
there are any. A file first, like all metrics: an outage of MLflow loses none. Cost: 1 ms a sample, 50 ms with GPUs.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from data_prep import store
from training import run_files
from training.planning.hardware import query_gpus

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 10.0
MEGABYTE = 1e6
GPU_METRICS = {
    "utilization.gpu": "utilization_percentage",
    "memory.used": "memory_usage_megabytes",
    "power.draw": "power_usage_watts",
}


@contextlib.contextmanager
def sampling(run_dir: Path, interval_seconds: float = INTERVAL_SECONDS) -> Iterator[None]:
    """Sample while the context is open; at least once, at its end."""
    done = threading.Event()
    thread = threading.Thread(
        target=_sample_until, args=(done, run_dir / run_files.SYSTEM, interval_seconds), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _sample_until(done: threading.Event, path: Path, interval_seconds: float) -> None:
    psutil.cpu_percent()  # the first call only starts the measurement
    network = psutil.net_io_counters()
    number = path.read_text().count("\n") if path.exists() else 0  # a resumed run goes on
    while True:
        finished = done.wait(interval_seconds)
        line = {"step": number, "time": time.time(), **sample(path.parent, network)}
        try:
            store.append(path, json.dumps(line) + "\n")
            number += 1
        except OSError as error:  # a full disk is told by who cannot go on with it
            logger.debug("%s: %s", path, error)
        if finished:
            return


def sample(directory: Path, network_at_start) -> dict[str, float]:
    """The load since the last sample (CPU), since the start (network) and now (the rest)."""
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(str(directory)), psutil.net_io_counters()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
        "system/disk_usage_percentage": disk.percent,
        "system/disk_available_megabytes": disk.free / MEGABYTE,
        "system/network_receive_megabytes": (network.bytes_recv - network_at_start.bytes_recv) / MEGABYTE,
        "system/network_transmit_megabytes": (network.bytes_sent - network_at_start.bytes_sent) / MEGABYTE,
        **sample_gpus(),
    }


def sample_gpus() -> dict[str, float]:
    """Utilisation, memory and power of each GPU; nothing where there is no nvidia-smi or it does not answer."""
    return {
        f"system/gpu_{number}_{name}": value
        for number, values in enumerate(query_gpus(*GPU_METRICS))
        for name, value in zip(GPU_METRICS.values(), values, strict=True)
        if value is not None
    }
