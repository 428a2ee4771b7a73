"""A flow run lives no longer than the worker that started it.

In: nothing. Out: nothing; the process gets SIGTERM when its worker dies, however that happens, and then ends as on a
cancellation: checkpoint, ranks ended, state Crashed. Without this it would go on alone, and nobody could cancel it.
Cost: one system call.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_worker() -> None:
    """Only for runs that a worker started; a run of `python train.py` belongs to its terminal."""
    if "PREFECT__FLOW_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)
