"""The Prefect server a direct run reports to: the one that is up, or a temporary one of our own.

In: prefect.toml and the environment. Out: the address in PREFECT_API_URL. A temporary server starts while we import the
rest (3 s, 7 s when it creates the database), is light (no UI, no scheduler), lives on loopback and dies with this
process; its database is the user's, so a server started later shows the run.
Prefect would start one by itself, but later, and when prefect.toml names an address it does so with broken events.
"""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from data_prep.errors import PandaError
from training.launch.commands import python_path

DEFAULT_URL = "http://127.0.0.1:4200/api"
START_SECONDS = 120
LOG_CHARACTERS = 2000
TEMPORARY = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
"""What makes a server light: the same switches that Prefect's own temporary server sets."""

logger = logging.getLogger(__name__)


class ServerError(PandaError):
    """No Prefect server could be reached or started."""


@contextlib.contextmanager
def connected() -> Iterator[Callable[[], None]]:
    """Yields a function that waits until the server answers; import what is heavy before calling it."""
    url = api_url()
    if answers(url):
        os.environ["PREFECT_API_URL"] = url
        yield lambda: None
        return
    logger.info("no Prefect server at %s: starting a temporary one", url)
    port = _free_port()
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.stack.prefect_server", str(port)],
            env={**os.environ, **TEMPORARY, "PYTHONPATH": python_path()},
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for us: the server has to see the run end
        )
        try:
            yield lambda: wait_for_server(process, os.environ["PREFECT_API_URL"], log)
        finally:
            process.terminate()
            process.wait(timeout=30)


def wait_for_server(process: subprocess.Popen, url: str, log: TextIO) -> None:
    """Until a server just started answers; what it has logged tells why it does not."""
    deadline = time.monotonic() + START_SECONDS
    while not answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            raise ServerError(f"the Prefect server at {url} did not start:\n{log.read()[-LOG_CHARACTERS:]}")
        time.sleep(0.1)


def answers(url: str) -> bool:
    """Whether a server is up: its `/health` answers 200."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return response.status == 200
    except (OSError, ValueError):
        return False


def api_url() -> str:
    """The address of the server to use: PREFECT_API_URL, or prefect.toml's, read without importing prefect (1.5 s)."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    with contextlib.suppress(OSError, KeyError, tomllib.TOMLDecodeError):
        return tomllib.loads(Path("prefect.toml").read_text(encoding="utf-8"))["api"]["url"]
    return DEFAULT_URL


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(port: int) -> None:
    """The child: end with the parent, whatever ends it."""
    from training.launch.exits import die_with_parent

    die_with_parent()
    import uvicorn

    uvicorn.run("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
