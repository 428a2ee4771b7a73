"""The Prefect server a direct run reports to: the one that is up, or a temporary one of our own.

In: an `Address` (prefect_home.py). Out: address and auth string in the environment. A temporary server starts
while we import the rest (3 s, 7 s when it creates the database), is light (no UI, no scheduler), is started again when
something kills it, and dies with this process; its database is the project's, so a server started later shows the run.
Every server we start, also that of `panda up`, is on loopback, asks for the auth string, and takes nothing from pages
of others (flows/stack/guard.py).
Prefect would start one by itself, but later, and when an address is configured it does so with broken events.
"""

import base64
import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from data_prep.errors import PandaError
from flows.stack import guard, listeners, old_database
from flows.stack.prefect_home import SERVER_AUTH_STRING, Address, address, own_address, server_auth_string, set_by_user
from training.launch.commands import python_path
from training.launch.processes import LOOPBACK, die_with_parent

CORS = ("PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS", "PREFECT_SERVER_CORS_ALLOWED_ORIGINS")
OTHER_LOGINS = ("PREFECT_API_KEY", "PREFECT_CLIENT_CUSTOM_HEADERS")  # of Prefect Cloud, of a proxy
START_SECONDS = 300  # 3 are usual; a machine with ten times the work it has cores for needed more than 120
STOP_SECONDS = 30
LOOK_SECONDS = 0.5
MOST_STARTS = 10
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
    there = address()
    reason = unusable(there)
    if not reason:
        with environment(there.variables()):
            yield lambda: None
        return
    if there.by_user and answers(there.url):
        raise ServerError(reason)
    logger.info("%s: starting a temporary one", reason)
    old_database.adopt()
    with socket.create_server((LOOPBACK[0], 0)) as listening:
        temporary = own_address(listening.getsockname()[1])
        seen_at = {"PREFECT_UI_URL": there.url.removesuffix("/api")}  # where a server started later shows the run
        with environment(seen_at | temporary.variables()), tempfile.TemporaryFile("w+") as log:
            server = Temporary(listening, log)
            try:
                yield lambda: server.wait_until_up(temporary.url)
            finally:
                server.stop()


class Temporary:
    """A light server at a socket that stays ours: while nobody serves it, requests wait there.

    What was being answered when the server was killed, Prefect's client asks again.
    """

    def __init__(self, listening: socket.socket, log: TextIO):
        self._listening, self._log = listening, log
        self._ending = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._process = self._start()

    def wait_until_up(self, url: str) -> None:
        """Until it answers, started again where it is killed before; from then on it is kept."""
        for left in reversed(range(MOST_STARTS)):
            try:
                wait_for_server(self._process, url, self._log)
                break
            except ServerError:
                was_killed = (self._process.returncode or 0) < 0
                if not (was_killed and left):
                    raise
            self._start_again()
        self._keeper.start()

    def stop(self) -> None:
        self._ending.set()
        if self._keeper.ident:
            self._keeper.join()
        stop(self._process)

    def _start(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.stack.prefect_server", *_words(self._listening)],
            env={**os.environ, **TEMPORARY, "PYTHONPATH": python_path()},
            pass_fds=[self._listening.fileno()],
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for us: the server has to see the run end
        )

    def _start_again(self) -> None:
        logger.warning("this run's Prefect server died (%s); starting it again", self._process.returncode)
        self._process = self._start()

    def _keep(self) -> None:
        """It dies with the thread that has started it, so this one lives until the end."""
        for _ in range(MOST_STARTS):
            while self._process.poll() is None:
                if self._ending.wait(LOOK_SECONDS):
                    return
            self._start_again()
        self._listening.close()  # who asks now gets an answer: nobody is there
        self._ending.wait()


def stop(process: subprocess.Popen) -> None:
    """End a server; one that a busy machine does not let end is killed, which its database survives."""
    process.terminate()
    try:
        process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Of this process and its children, for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


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


def unusable(there: Address) -> str:
    """Why the server of this address is not to be used; empty when it is."""
    if not answers(there.url):
        return f"no Prefect server at {there.url}"
    project = listeners.project_of(there.url) if listeners.is_local(there.url) else None
    if project and project != Path.cwd() and not there.by_user:
        return f"the Prefect server at {there.url} is that of {project}"
    others = any(set_by_user(name) for name in OTHER_LOGINS)
    if not others and http_status(there.url, there.auth_string) == 401:
        whose = f", started in {project}," if project else ""
        return f"the Prefect server at {there.url}{whose} refuses our auth string (PREFECT_API_AUTH_STRING)"
    return ""


def http_status(url: str, auth_string: str) -> int:
    """HTTP status of a request that needs the auth string, where a server asks for one."""
    headers = {"Authorization": f"Basic {base64.b64encode(auth_string.encode()).decode()}"} if auth_string else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/admin/version", headers=headers), timeout=10
        ) as done:
            return done.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _words(listening: socket.socket) -> list[str]:
    """Arguments of the child: the port, the socket that has it already, and who we are."""
    return [str(listening.getsockname()[1]), str(listening.fileno()), str(os.getpid())]


def _serve(port: int, listening: int | None = None, parent: int = 0) -> None:
    """The child: end with the parent, whatever ends it.

    :param listening: file descriptor of a socket that listens at the port
    :param parent: pid, where it may be gone by now
    """
    die_with_parent(parent=parent)
    own = guard.origins(port, [set_by_user("PREFECT_UI_API_URL") or "", *_allowed_by_user()])
    os.environ.update({SERVER_AUTH_STRING: server_auth_string(), CORS[0]: ",".join(own)})
    import uvicorn
    from prefect.server.api.server import create_app

    app = guard.Guard(create_app(), own)
    server = uvicorn.Server(uvicorn.Config(app, host=LOOPBACK[0], port=port, log_level="error"))
    server.run(sockets=[socket.socket(fileno=listening)] if listening is not None else None)


def _allowed_by_user() -> list[str]:
    """Origins beside our own, as Prefect's setting names them."""
    return next((value.split(",") for name in CORS if (value := set_by_user(name))), [])


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
