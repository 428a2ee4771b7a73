"""`panda serve-flow`: one command, one terminal: server (if none is up), deployments and their runs, until Ctrl-C.

In: prefect.yaml. Out: nothing. For trying things out: runs are processes of this one, and the code of a flow is sent to
them as it was when serving began. Prefect is imported once the address of its server is known. Cost: 10 s to start.
"""

import argparse
import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import PandaError
from flows.stack import listeners, old_database, services
from flows.stack.prefect_home import address
from flows.stack.prefect_server import answers, environment, unusable, wait_for_server

STOP_SECONDS = 10.0
FROM_YAML = ("name", "description", "tags", "parameters", "version")

logger = logging.getLogger(__name__)


def serve_flow(argv: list[str]) -> int:
    """Serve the deployments of prefect.yaml."""
    parser = argparse.ArgumentParser(
        prog="panda serve-flow", description="Serve the deployments in this terminal.", allow_abbrev=False
    )
    parser.add_argument("--state_dir", default=".panda", help="Directory of the server's log [.panda]")
    options = parser.parse_args(argv)
    with server(Path(options.state_dir).absolute()):
        from prefect import serve

        from flows.stack.deployments import declared, deploy_automation

        deploy_automation()
        states = _named_schedules()
        serve(*(runner_deployment(entry, states) for entry in declared()), print_starting_message=True)
    return 0


@contextlib.contextmanager
def server(state_dir: Path) -> Iterator[None]:
    """The server that is up, or one that lives as long as we do."""
    there = address()
    reason = unusable(there)
    with environment(there.variables()):
        if not reason:
            yield
            return
        if answers(there.url) or not listeners.is_local(there.url):
            raise PandaError(f"{reason}; PREFECT_API_URL=http://127.0.0.1:PORT/api names another port")
        logger.info("starting a Prefect server at %s", there.url)
        old_database.adopt()
        log = state_dir / "prefect-server.log"
        process = services.start(services.prefect_server(there.url), log)
        try:
            with open(log, encoding="utf-8") as text:
                wait_for_server(process, there.url, text)
            yield
        finally:
            services.stop(process, STOP_SECONDS)


def _named_schedules() -> dict[str, dict[str, bool]]:
    """Those on the server, such that serving leaves them as people made them, and which of them are active."""
    from prefect.client.orchestration import get_client

    from flows.stack import schedules
    from flows.stack.deployments import declared

    with get_client(sync_client=True) as client:
        return schedules.name_all(client, declared())


def runner_deployment(entry: dict[str, Any], states: dict[str, dict[str, bool]] | None = None) -> Any:
    """One of them, for `serve`: the same but for the work pool, which serving does not use.

    :param states: which schedules are active on the server; others are as prefect.yaml says.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.schedules import Cron

    path, _, name = entry["entrypoint"].partition(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    limit = entry.get("concurrency_limit")
    known = (states or {}).get(f"{flow.name}/{entry['name']}", {})
    schedules = [
        Cron(
            one["cron"],
            timezone=one.get("timezone"),
            slug=one.get("slug"),
            active=known.get(one.get("slug"), one.get("active", True)),
            parameters=one.get("parameters"),
        )
        for one in entry.get("schedules", [])
    ]
    return flow.to_deployment(
        **{key: entry[key] for key in FROM_YAML if key in entry},
        concurrency_limit=ConcurrencyLimitConfig(**limit) if limit else None,
        schedules=schedules or None,
    )
