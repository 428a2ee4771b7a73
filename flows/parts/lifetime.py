"""What a flow run does first: it ties itself to its worker, and lets our own log lines through.

In: nothing. Out: nothing. Cost: one system call.
"""

import ctypes
import logging
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
OURS = ("data_prep", "training", "configs", "tasks", "flows")


def begin() -> None:
    """Call it first in a flow."""
    end_with_worker()
    for name in OURS:  # Prefect sends what these loggers say to the server, but leaves their level at WARNING
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def end_with_worker() -> None:
    """SIGTERM when the worker that started this run dies, however that happens: checkpoint, ranks ended, Crashed.

    Without this it would go on alone, and nobody could cancel it. A run of `python train.py` belongs to its terminal.
    """
    if "PREFECT__FLOW_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)
