"""A real MLflow database (made once, copied) and a real MLflow server for the tests of tracking and registry."""

import base64
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from training.registry.loaded_back import generate, load_served
from training.tracking.sync import connect


def load_and_generate(model_uri: str, prompt: str, max_new_tokens: int, uri: str) -> str:
    """Text a registered model writes after `prompt`, loaded through `mlflow.pyfunc`."""
    return generate(load_served(model_uri, uri), prompt, max_new_tokens)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """An SQLite file with MLflow's tables."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def output_dir(tmp_path, empty_database) -> Path:
    """An output directory with an empty MLflow database."""
    directory = tmp_path / "outputs"
    directory.mkdir()
    shutil.copyfile(empty_database, directory / "mlflow.db")
    return directory


@pytest.fixture
def run_dir(output_dir) -> Path:
    """An empty run directory."""
    path = output_dir / "run-1"
    path.mkdir()
    return path


@contextmanager
def server(output_dir: Path, port: int) -> Iterator[subprocess.Popen]:
    """A real MLflow server over the database of an output directory, killed at the end, with all its children."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{output_dir}/mlflow.db"]
    command += ["--artifacts-destination", f"{output_dir}/mlartifacts", "--host", "127.0.0.1", "--port", str(port)]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(output_dir / "server.log", "ab") as log:
        process = subprocess.Popen(
            [*command, "--workers", "1"], env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for_health(port, process)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_health(port: int, process: subprocess.Popen, timeout_seconds: float = 90) -> None:
    """Return when the server answers."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the MLflow server ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the MLflow server did not start")


@contextmanager
def guarded(port: int, password: str) -> Iterator[str]:
    """A proxy before the server at `port` that asks for user `panda` and this password; its address."""
    wanted = "Basic " + base64.b64encode(f"panda:{password}".encode()).decode()

    class Guard(BaseHTTPRequestHandler):
        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != wanted:
                return self.answer(401, b"who are you?")
            address = f"http://127.0.0.1:{port}{self.path}"
            headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
            call = urllib.request.Request(address, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(call, timeout=60) as response:
                    self.answer(response.status, response.read())
            except urllib.error.HTTPError as error:
                self.answer(error.code, error.read())

        def answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

    guard = ThreadingHTTPServer(("127.0.0.1", 0), Guard)
    threading.Thread(target=guard.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{guard.server_port}"
    finally:
        guard.shutdown()
        guard.server_close()
