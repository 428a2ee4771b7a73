"""What a flow run does first: it ties itself to its worker, lets our log lines through, shows errors as messages.

In: nothing. Out: nothing. Cost: one system call.
"""

import logging
import os
import signal

from data_prep.errors import PandaError
from training.launch.processes import die_with_parent

OURS = ("data_prep", "training", "configs", "tasks", "flows")
OF_RUNS = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine")


def begin() -> None:
    """Call it first in a flow."""
    end_with_worker()
    for name in OURS:  # Prefect sends what these loggers say to the server, but leaves their level at WARNING
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
    for name in OF_RUNS:
        logging.getLogger(name).addFilter(show_as_message)  # added once, however often


def show_as_message(record: logging.LogRecord) -> bool:
    """A filter: where Prefect logs the traceback of a `PandaError`, its message alone is what helps.

    Of a Failed state that a stage has returned Prefect logs a traceback too, `NoneType: None`.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, PandaError):
        record.msg, record.args = str(error), ()
    if error is None or isinstance(error, PandaError):
        record.exc_info = record.exc_text = None
    return True


def end_with_worker() -> None:
    """SIGTERM when the worker that started this run dies, however that happens: checkpoint, ranks ended, Crashed.

    Without this it would go on alone, and nobody could cancel it. A run of `python train.py` belongs to its terminal.
    """
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        die_with_parent(signal.SIGTERM, os.getppid())
