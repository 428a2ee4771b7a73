"""`panda serve-flow`: one command, one terminal: server (if none is up), deployments and their runs, until Ctrl-C.

In: prefect.yaml (names, limits, schedules), prefect.toml. Out: runs. For one machine and one person; `panda up` is for
everything else: it survives the terminal, restarts what dies, and a run there sees the code as it is when it starts,
here as it was when serving began. Cost: 10 s to start.
"""

import argparse
import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import PandaError
from flows import services
from flows.server import answers, api_url, wait_for_server

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

        from flows.deploy import deploy_automation

        deploy_automation()
        serve(*(runner_deployment(entry) for entry in declared()), print_starting_message=True)
    return 0


@contextlib.contextmanager
def server(state_dir: Path) -> Iterator[None]:
    """The server that is up, or one that lives as long as we do."""
    url = os.environ["PREFECT_API_URL"] = api_url()
    if answers(url):
        yield
        return
    logger.info("starting a Prefect server at %s", url)
    log = state_dir / "prefect-server.log"
    process = services.start(services.prefect_server(url), log)
    try:
        with open(log, encoding="utf-8") as text:
            wait_for_server(process, url, text)
        yield
    finally:
        services.stop(process, STOP_SECONDS)


def declared() -> list[dict[str, Any]]:
    """The deployments of prefect.yaml."""
    path = Path("prefect.yaml")
    if not path.exists():
        raise PandaError("no prefect.yaml here; run this in the directory of the project")
    return yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]


def runner_deployment(entry: dict[str, Any]) -> Any:
    """One of them, for `serve`: the same but for the work pool, which serving does not use."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.schedules import Cron

    path, _, name = entry["entrypoint"].partition(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    limit = entry.get("concurrency_limit")
    schedules = [
        Cron(one["cron"], timezone=one.get("timezone"), slug=one.get("slug"), active=one.get("active", True))
        for one in entry.get("schedules", [])
    ]
    return flow.to_deployment(
        **{key: entry[key] for key in FROM_YAML if key in entry},
        concurrency_limit=ConcurrencyLimitConfig(**limit) if limit else None,
        schedules=schedules or None,
    )
