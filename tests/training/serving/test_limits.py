"""What ends by time: a body that does not arrive, an answer that does not end. With the real application and model."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.support.tiny_models import save_full_model
from training.serving import desk, server
from training.serving.deployed import Deployed, load
from training.serving.server import Names, build_app


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> Deployed:
    directory: Path = tmp_path_factory.mktemp("model")
    save_full_model(directory)
    return load(directory, directory / "cache")


def ask(deployed: Deployed, receive) -> tuple[int, dict]:
    """Status and JSON of a request for a completion whose body comes from `receive`."""
    sent: list[dict] = []
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip

    async def send(message: dict) -> None:
        sent.append(message)

    app, _ = build_app(deployed, Names(("tiny", "tiny:1"), 0), any_host=False)
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))


def test_a_body_that_does_not_arrive(deployed, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.01)

    async def receive() -> dict:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    status, answer = ask(deployed, receive)
    assert status == 408 and "not there after" in answer["error"]["message"]


def test_an_answer_that_takes_too_long_ends_where_it_is(deployed, monkeypatch):
    monkeypatch.setattr(desk, "MAX_SECONDS", -1)
    body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 50}).encode()
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict:
        if parts:
            return parts.pop()
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    status, answer = ask(deployed, receive)
    assert status == 200 and answer["usage"]["completion_tokens"] == 1
    assert answer["choices"][0]["finish_reason"] == "length"
