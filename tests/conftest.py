"""What tests of several folders share."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.stack import prefect_server as server
from flows.stack.prefect_home import AUTH_STRING
from tests.support.prefect_database import new_home
from tests.support.tokenizers import bytes_dir, bytes_tokenizer, llama_dir, llama_tokenizer, smollm2_dir

# Several tests run at once: threads of torch that wait for each other would spend the processors on that.
os.environ["OMP_NUM_THREADS"] = "1"
# As on a user's machine: what one of the many processes has compiled the others need not compile again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

__all__ = ["bytes_dir", "bytes_tokenizer", "llama_dir", "llama_tokenizer", "smollm2_dir"]  # fixtures


class AtOnce:
    """A failure is shown when it happens: a run of many minutes that is ended from outside has told what it knew."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.section(f"{report.when} of {report.nodeid}", sep="_")
            self.terminal.write_line(report.longreprtext)


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):  # not in a process of xdist
        session.config.pluginmanager.register(AtOnce(session.config.pluginmanager.getplugin("terminalreporter")))


@dataclass(frozen=True)
class Server:
    """A Prefect server that tests share."""

    url: str
    auth_string: str
    database: Path

    @property
    def settings(self) -> dict:
        """For Prefect's `temporary_settings`."""
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

        return {PREFECT_API_URL: self.url, PREFECT_API_AUTH_STRING: self.auth_string}


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    """One light Prefect server for many runs, so that each does not start its own (6 s); own database, own port."""
    home = new_home(tmp_path_factory.mktemp("prefect"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        patch.setenv("PREFECT_PROFILES_PATH", str(home / "profiles.toml"))
        patch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # answers nothing, so a temporary one starts
        with server.connected() as wait_until_up:
            wait_until_up()
            here = Server(os.environ["PREFECT_API_URL"], os.environ[AUTH_STRING], home / "prefect.db")
            patch.undo()  # only the tests that ask for the server see it
            for name in (AUTH_STRING, "PREFECT_UI_URL"):
                os.environ.pop(name, None)
            yield here


@pytest.fixture
def use_prefect_server(prefect_server, monkeypatch):
    """Runs of this test report to the shared server."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_server.url)
    monkeypatch.setenv(AUTH_STRING, prefect_server.auth_string)


@pytest.fixture
def prefect_client(prefect_server):
    """A client of the shared server."""
    from prefect.client.orchestration import get_client
    from prefect.settings import temporary_settings

    with temporary_settings(prefect_server.settings), get_client(sync_client=True) as client:
        yield client
