"""Work of a process of its own done in the process of the test: where the launcher would start one rank, nothing else.

In: the modules that may run here. Out: a replacement of `launcher.run_commands`. A child costs five seconds of imports;
tests of what surrounds it need none, tests of the child start a real one.
"""

import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from training.distributed import Ranks, join, leave, this_rank
from training.launch import launcher
from training.launch.exits import ExitReason
from training.launch.launcher import ExitReport

RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def running_here(*modules: str) -> Callable[..., ExitReport]:
    """`launcher.run_commands`, but for one command that runs one of these modules."""
    original = launcher.run_commands

    def run_commands(commands: list[Any], settings: Any, listener: Any) -> ExitReport:
        module, *arguments = commands[0].argv[2:]
        if len(commands) > 1 or module not in modules:
            return original(commands, settings, listener)
        handlers = {number: signal.getsignal(number) for number in changeable_signals()}
        rank = {name: value for name, value in commands[0].env.items() if name in RANK}
        try:
            with environment(**rank), mock.patch.object(sys, "argv", [module, *arguments]):
                importlib.import_module(module).main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return ExitReport(ExitReason.completed)

    return run_commands


def changeable_signals() -> tuple[signal.Signals, ...]:
    """Those whose handler a rank may set: only the main thread of a process can."""
    here = threading.current_thread() is threading.main_thread()
    return (signal.SIGTERM, signal.SIGINT) if here else ()


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set these and put back these: `mock.patch.dict` puts back all, also what another thread had set for a moment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@contextmanager
def alone() -> Iterator[Ranks]:
    """This process as rank 0 of 1."""
    with environment(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_PORT="0"):
        ranks = this_rank()
        join(ranks)
        try:
            yield ranks
        finally:
            leave()
