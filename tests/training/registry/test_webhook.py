"""A webhook of MLflow tells others of a new champion: what docs/operations.md says, with a real server and receiver."""

import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cryptography.fernet import Fernet
from mlflow import MlflowClient

from tests.support.mlflow_fixtures import server
from training.launch.processes import free_port
from training.registry.versions import CHAMPION, Registry


@pytest.fixture
def receiver():
    """(Address, what was sent to it)."""
    got: queue.Queue[dict] = queue.Queue()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    there = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=there.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{there.server_port}/", got
    there.shutdown()
    there.server_close()


def test_a_new_champion_is_told(output_dir, receiver, monkeypatch):
    address, got = receiver
    monkeypatch.setenv("MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", Fernet.generate_key().decode())
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")  # the defaults take https and public addresses alone
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    port = free_port()
    with server(output_dir, port):
        uri = f"http://127.0.0.1:{port}"
        client = MlflowClient(uri, uri)
        client.create_webhook("deploy", address, events=["model_version_alias.created"], secret="of both")
        client.create_registered_model("panda-llama-7b")
        run = client.create_run("0").info
        client.create_model_version("panda-llama-7b", source=f"{run.artifact_uri}/model", run_id=run.run_id)
        registry = Registry(uri)
        registry.set_alias(registry.resolve("models:/panda-llama-7b/1"), CHAMPION)
        sent = got.get(timeout=60)
    assert sent["data"] == {"name": "panda-llama-7b", "alias": "champion", "version": "1"}
