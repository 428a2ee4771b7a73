"""Why a training process ended: a closed set of reasons, each with an exit code and whether trying again can help.

In: an exception of a rank, or the exit code the operating system gives. Out: an `ExitReason`; `run_rank` ends the
process with its code. The worker and the launcher share this file, so it imports neither torch nor anything heavy:
torch's exceptions are known by name. Cost: none.

How a rank tells its parent: an event `Exit`, then the exit code. A rank that could
print no line (killed, crashed in C) is judged by the code alone.
"""

import errno
import faulthandler
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from typing import NoReturn

from data_prep.errors import CorpusError, DiskError, PandaError, StoreError, disk_errors
from training.errors import MlflowAway
from training.launch.events import emit
from training.launch.processes import die_with_parent

OWNED = "PANDA_OWNED"  # set by the launcher: this process may not outlive its parent


class ExitReason(StrEnum):
    """What ended a run. Decides the retry and the status of the MLflow run."""

    completed = "completed"
    cancelled = "cancelled"
    user_error = "user_error"
    data = "data"
    out_of_memory = "out_of_memory"
    non_finite = "non_finite"
    lost_rank = "lost_rank"
    infrastructure = "infrastructure"

    @property
    def code(self) -> int:
        """Exit code: 0 for completed, 80 to 86 for the rest (Python uses 1 and 2, shells 126 and above)."""
        return EXIT_CODES[self]

    @property
    def retry_helps(self) -> bool:
        """True where the same run, resumed from its last checkpoint, may well succeed."""
        return self in (ExitReason.lost_rank, ExitReason.infrastructure)

    @property
    def mlflow_status(self) -> str:
        """FINISHED, KILLED or FAILED."""
        return {ExitReason.completed: "FINISHED", ExitReason.cancelled: "KILLED"}.get(self, "FAILED")


EXIT_CODES: dict[ExitReason, int] = {
    ExitReason.completed: 0,
    ExitReason.cancelled: 80,
    ExitReason.user_error: 81,
    ExitReason.data: 82,
    ExitReason.out_of_memory: 83,
    ExitReason.non_finite: 84,
    ExitReason.lost_rank: 85,
    ExitReason.infrastructure: 86,
}
_REASONS = {code: reason for reason, code in EXIT_CODES.items()}


class TrainingStopped(Exception):
    """Raised by a rank that has obeyed SIGTERM: its checkpoint is written, the run is cancelled."""


class NonFiniteError(PandaError):
    """Loss or gradient is not a finite number; raised before the optimizer step, naming step, rank and records."""


class DataError(PandaError):
    """Prepared data cannot be trained on (damaged, or not what the configuration says)."""


def reason_of_code(code: int) -> ExitReason:
    """The reason an exit code stands for; a death by signal is a lost rank, an unknown code infrastructure."""
    if code < 0:
        return ExitReason.lost_rank
    return _REASONS.get(code, ExitReason.infrastructure)


def reason_of_error(error: BaseException) -> ExitReason:
    """The reason an exception stands for. Unknown exceptions count as infrastructure: one retry is cheap."""
    if isinstance(error, TrainingStopped | KeyboardInterrupt):
        return ExitReason.cancelled
    if isinstance(error, NonFiniteError):
        return ExitReason.non_finite
    if isinstance(error, CorpusError | StoreError | DataError):
        return ExitReason.data
    if isinstance(error, PandaError):
        passes = isinstance(error, MlflowAway | DiskError)
        return ExitReason.infrastructure if passes else ExitReason.user_error
    if _is_out_of_memory(error):
        return ExitReason.out_of_memory
    return ExitReason.lost_rank if _is_lost_peer(error) else ExitReason.infrastructure


def _is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError, MemoryError, and the plain RuntimeError of torch's CPU allocator."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or "OutOfMemoryError" in {kind.__name__ for kind in type(error).__mro__}
        or "can't allocate memory" in text
        or "out of memory" in text
    )


def _is_lost_peer(error: BaseException) -> bool:
    """What the surviving ranks raise when another one is gone: the consequence, never the cause."""
    names = {kind.__name__ for kind in type(error).__mro__}
    peer_texts = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")
    return bool(names & {"DistBackendError", "DistNetworkError", "DistStoreError"}) or (
        isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in peer_texts)
    )


def run_rank(main: Callable[[], None]) -> NoReturn:
    """Run a rank's `main` and leave the process with the exit code of what happened. Never returns.

    Always by `os._exit`. A failed rank has peers in a collective, and closing the process group would wait for them.
    A finished one has closed its group and its files, and what the interpreter does after that is not safe: one
    finished run in 20 to 60 was aborted there (SIGABRT, "terminate called without an active exception": a C++ thread
    that nobody had joined; no Python frame was left), which a launcher rightly takes for a lost rank.
    """
    if os.environ.get(OWNED):
        die_with_parent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the launcher asks for stacks when the run stalls
    try:
        with disk_errors():
            main()
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code:
            with suppress(OSError):  # of the disk that has ended it, and holds the log as well
                _tell(error)
            _leave(reason_of_error(error).code)
    _leave(0)


def _leave(code: int) -> NoReturn:
    """End the process, with what it has printed but without the interpreter's teardown."""
    with suppress(OSError):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _tell(error: BaseException) -> None:
    """Say why on stderr (a clear line; before it the traceback of what nobody expects) and as an event.

    That another rank is gone is said without one: where this rank waited for it is of no interest.
    """
    reason = reason_of_error(error)
    expected = isinstance(error, PandaError | TrainingStopped)
    details = "" if expected else "".join(traceback.format_exception(error))
    print(details if reason is not ExitReason.lost_rank else "", file=sys.stderr, end="")
    message = str(error) or type(error).__name__
    print(f"{reason.value}: {message}", file=sys.stderr, flush=True)
    rank = int(os.environ.get("RANK", "0"))
    emit({"event": "exit", "reason": reason.value, "rank": rank, "message": message, "details": details,
          "time": time.time()})  # fmt: skip
