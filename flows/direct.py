"""Run the flow in this process and tell a person what came of it.

In: the command line and the configuration it makes. Out: exit code; the report on stdout (or one JSON line), logs on
stderr. With a Prefect server up the run shows there at once; without one Prefect starts a temporary server and keeps
the run in its database, where a server started later finds it. Cost: 3 s of Prefect, 10 s when it starts a server.
"""

import contextlib
import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.flags import CommandLine
from configs.load import Loaded, dump
from data_prep.errors import PandaError
from flows import preflight
from flows.cli import print_json

logger = logging.getLogger(__name__)


def run(line: CommandLine, loaded: Loaded) -> int:
    """Check, then run `panda-train` with what was typed as its parameters."""
    use_sample_corpus_if_nothing_else(loaded)
    preflight.check(loaded.settings, chosen(loaded))
    resolved = Path("configs") / "tmp.yaml"
    if resolved.parent.is_dir():
        resolved.write_text(dump(loaded.settings), encoding="utf-8")
    choose_server()
    summary = call_flow({**line.values, "overrides": line.overrides or None, "conf_path": line.switches.conf_path})
    if line.switches.json:
        print_json(summary)
    else:
        from flows.report import show

        show(summary, loaded.settings)
    return 0


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


def choose_server() -> None:
    """Without a server that answers, let Prefect start a temporary one (an empty PREFECT_API_URL asks for that)."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "data_prep,training,tasks,flows")
    url = os.environ.get("PREFECT_API_URL") or _configured_server()
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return
    except (OSError, ValueError):
        logger.info("no Prefect server at %s: starting a temporary one", url)
        os.environ["PREFECT_API_URL"] = ""


def _configured_server() -> str:
    """The address in prefect.toml, without importing prefect (1.5 s)."""
    import tomllib

    with contextlib.suppress(OSError, KeyError, tomllib.TOMLDecodeError):
        return tomllib.loads(Path("prefect.toml").read_text(encoding="utf-8"))["api"]["url"]
    return "http://127.0.0.1:4200/api"


def call_flow(parameters: dict[str, Any]) -> dict[str, Any]:
    """Run the flow to its end; its failure is raised here, a user's error as the `PandaError` it is."""
    with stdout_for_results():
        from flows.panda_train import panda_train

        state = panda_train(**parameters, return_state=True)
        result = state.result(raise_on_failure=False)
    if state.is_completed():
        return result
    if isinstance(result, PandaError):
        raise result
    raise PandaError(f"the run ended as {state.name}: {state.message}")


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """Whatever libraries print meanwhile goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
