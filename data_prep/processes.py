"""Worker processes of the data stages, and how much memory a process has used.

In: a function and the arguments of its calls. Out: results, in the order in which they are done, from processes that
never outlive this one, however it ends. Cost: about 0.5 s for the first pool of a program (a clean server process that
has imported what its workers need), 20 ms a worker.
"""

import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.errors import StoreError

Calls = dict[str, tuple[Any, ...]]
"""Arguments of one call each, by a key of the caller's."""

PRELOADED = ["data_prep.tokens.tokenize", "pandas"]
"""pandas, because pyarrow imports it, if it is there, with the first array it makes."""

FanOut = Callable[[Callable[..., Any], Calls], Iterator[tuple[str, Any]]]
"""Makes calls of a function somewhere, the first ones first; yields (key, result) of each when it is done."""


def on_processes(num_workers: int) -> FanOut:
    """Fan out over processes of this machine."""
    return partial(_call_in_processes, num_workers)


def _call_in_processes(num_workers: int, function: Callable[..., Any], calls: Calls) -> Iterator[tuple[str, Any]]:
    """Forked from a clean server process, which is safe beside threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_die_with_parent) as pool:
        futures = {pool.submit(function, *arguments): key for key, arguments in calls.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise StoreError(
                "A process of data preparation was killed (out of memory?). What is finished is kept; go on with "
                f"--prepare_workers {num_workers // 2}. (A script of your own that calls this must do so below "
                'if __name__ == "__main__":, because its processes import it.)'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


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
