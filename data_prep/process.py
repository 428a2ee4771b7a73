"""Worker processes of the data stages, and how much memory a process has used.

In: a number of workers. Out: a pool whose processes never outlive this one, however it ends.
Cost: about 0.3 s for the first pool of a program (a clean server process that has imported pyarrow), 20 ms a worker.
"""

import multiprocessing
import os
import resource
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def worker_pool(num_workers: int) -> ProcessPoolExecutor:
    """Processes forked from a clean server process (safe beside threads) that die with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.unit"])
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_die_with_parent)


def peak_rss_bytes() -> int:
    """The most memory this process has held at once. (`getrusage` would count what its parent held before exec.)"""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak_kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak_kib) * 1024


def _die_with_parent() -> None:
    """A worker waits for work for ever when its parent was killed, and keeps the server process alive: so watch it."""
    threading.Thread(target=_kill_after_parent, daemon=True).start()


def _kill_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only workers watch"
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
