"""Run the flow in this process and tell a person what came of it.

In: the command line and the configuration it makes. Out: exit code; the report on stdout (or one JSON line), logs on
stderr. With a Prefect server up the run shows there at once; without one it shows in a server started later.
Cost beyond the stages: 2 s of imports, 3 s more when a temporary server has to start.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.flags import CommandLine
from configs.load import Loaded, dump
from data_prep.errors import PandaError
from flows import preflight
from flows.json_line import print_json
from flows.server import connected

logger = logging.getLogger(__name__)


def run(line: CommandLine, loaded: Loaded) -> int:
    """Check, then run `panda-train` with what was typed as its parameters."""
    use_sample_corpus_if_nothing_else(loaded)
    preflight.check(loaded.settings, chosen(loaded))
    resolved = Path("configs") / "tmp.yaml"
    if resolved.parent.is_dir():
        resolved.write_text(dump(loaded.settings), encoding="utf-8")
    summary = call_flow(as_parameters(line))
    if line.switches.json:
        print_json(summary)
    else:
        from flows.report import show

        show(summary, loaded.settings)
    return 0


def as_parameters(line: CommandLine) -> dict[str, Any]:
    """What was typed as parameters of the flow, where None means "not given": an explicit none is an override."""
    nothing = [f"{name}=null" for name, value in line.values.items() if value is None]
    return {**line.values, "overrides": [*line.overrides, *nothing] or None, "conf_path": line.switches.conf_path}


def chosen(loaded: Loaded) -> set[str]:
    """Names somebody gave a value for."""
    return {name for name, origin in loaded.origins.items() if origin != "default"}


def use_sample_corpus_if_nothing_else(loaded: Loaded) -> None:
    """`--model panda-tiny` is for trying things out: without any corpus it writes and uses the sample."""
    data_dirs = {"instruction_tuning_data_dir", "pretraining_data_dir"}
    if loaded.settings.model == "panda-tiny" and not Path("dataset").exists() and not chosen(loaded) & data_dirs:
        from data_prep.sample import write_sample

        logger.info("no corpus in ./dataset: writing the sample corpus there")
        write_sample(Path("dataset"))


def call_flow(parameters: dict[str, Any]) -> dict[str, Any]:
    """Run the flow to its end; its failure is raised here, a user's error as the `PandaError` it is."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    with contextlib.redirect_stdout(sys.stderr), connected() as wait_for_server:  # stdout is for results
        from flows.panda_train import panda_train

        wait_for_server()
        with everything_sent():
            state = panda_train(**parameters, return_state=True)
            result: Any = state.result(raise_on_failure=False)
    if state.is_completed():
        return result
    if isinstance(result, PandaError):
        raise result
    raise PandaError(f"the run ended as {state.name}: {state.message}")


@contextlib.contextmanager
def everything_sent() -> Iterator[None]:
    """Before a temporary server ends, wait for what is sent to it in batches; later Prefect retries for a minute."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    try:
        yield
    finally:
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)
