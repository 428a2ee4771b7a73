"""Who may use a Prefect server of ours, asked by HTTP: every route that writes, with one thing wrong at a time.

A light server, as direct runs start it: the lines of `prefect_server.py` that start it also start that of `panda up`.
"""

import re
import uuid
from dataclasses import dataclass, field

import httpx
import pytest
from prefect.server.api.server import API_ROUTERS
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from flows.stack.guard import Guard, origins

WRITING = {"POST", "PUT", "PATCH", "DELETE"}
ROUTES = [
    (method, re.sub(r"\{[^}]*\}", str(uuid.UUID(int=7)), route.path))
    for router in API_ROUTERS
    for route in router.routes
    for method in sorted(getattr(route, "methods", None) or {"WEBSOCKET"})
]
OPEN = {"/ready"}  # and /health: for probes
SOCKETS = [path for method, path in ROUTES if method == "WEBSOCKET"]
STRANGER = "http://stranger.example"


@dataclass
class Visitor:
    """What somebody sends with each request; rightly by default."""

    url: str
    auth: tuple[str, str] | None
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=30))
    headers: dict[str, str] = field(default_factory=dict)

    def ask(self, method: str, path: str, **changes) -> httpx.Response:
        """One request, `headers` and `auth` changed."""
        headers = self.headers | changes.pop("headers", {})
        return self.client.request(
            method, self.url + path, headers=headers, auth=changes.pop("auth", self.auth), **changes
        )

    def statuses(self, methods: set[str], **changes) -> set[int]:
        """Of all routes with these methods."""
        asked = [(method, path) for method, path in ROUTES if method in methods and path not in OPEN]
        assert len(asked) > 50
        return {self.ask(method, path, **changes).status_code for method, path in asked}


@pytest.fixture(scope="module")
def visitor(prefect_server):
    """Somebody who has the auth string and a CSRF token."""
    known = Visitor(prefect_server.url, tuple(prefect_server.auth_string.split(":", 1)))
    token = known.ask("GET", "/csrf-token?client=test").json()["token"]
    known.headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"}
    return known


def test_with_everything_right_a_flow_is_made(visitor):
    assert visitor.ask("POST", "/flows/", json={"name": "guarded"}).status_code == 201
    own = {"Origin": visitor.url.removesuffix("/api")}
    assert visitor.ask("POST", "/flows/", json={"name": "guarded"}, headers=own).status_code == 200


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"auth": None}, 401),
        ({"auth": ("panda", "of-last-week")}, 401),
        ({"headers": {"Prefect-Csrf-Token": "of-last-week"}}, 403),
        ({"headers": {"Origin": STRANGER}}, 403),
        ({"headers": {"Origin": "http://127.0.0.1:5000"}}, 403),
        ({"headers": {"Origin": "null"}}, 403),
        ({"headers": {"Host": "stranger.example:4200"}}, 403),
    ],
    ids=str,
)
def test_every_writing_route_refuses(visitor, changes, status):
    assert visitor.statuses(WRITING, **changes) == {status}


@pytest.mark.parametrize(
    ("changes", "status"), [({"auth": None}, 401), ({"headers": {"Host": "127.0.0.1.stranger.example"}}, 403)], ids=str
)
def test_nothing_can_be_read_either(visitor, changes, status):
    assert visitor.statuses({"GET", "POST"}, **changes) == {status}


def test_a_page_of_others_gets_no_csrf_token(visitor):
    answer = visitor.ask("GET", "/csrf-token?client=x", headers={"Origin": STRANGER})
    assert answer.status_code == 403 and "token" not in answer.text
    wanted = {"Origin": STRANGER, "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in visitor.ask("OPTIONS", "/flows/", headers=wanted).headers


def test_health_is_for_everybody(visitor):
    assert visitor.ask("GET", "/health", auth=None).status_code == 200


@pytest.mark.parametrize("path", SOCKETS)
def test_sockets_refuse(visitor, path):
    address = visitor.url.replace("http", "ws", 1) + path
    with pytest.raises(InvalidStatus, match="403"):
        connect(address, origin=STRANGER, subprotocols=["prefect"])
    with connect(address, subprotocols=["prefect"]) as socket:
        socket.send('{"type": "auth", "token": "panda:of-last-week"}')
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=30)


class TestGuard:
    """Addresses, without a server."""

    guard = Guard(None, origins(4200, ["https://prefect.team.example/api"]))

    @pytest.mark.parametrize("host", ["127.0.0.1:4200", "localhost:4200", "LOCALHOST", "prefect.team.example"])
    def test_own_names(self, host):
        assert not self.guard.refusal([(b"host", host.encode())])

    @pytest.mark.parametrize(
        "host", ["", "localhost.", "a@localhost", "localhost/x", "127.0.0.1.nip.example", "127.0.0.1:x", "[::1"]
    )
    def test_other_names(self, host):
        assert "PREFECT_UI_API_URL" in self.guard.refusal([(b"host", host.encode())])

    def test_no_name_or_two(self):
        assert self.guard.refusal([]) and self.guard.refusal([(b"host", b"localhost"), (b"host", b"localhost")])

    @pytest.mark.parametrize(
        ("origin", "fine"),
        [
            ("https://prefect.team.example", True),
            ("http://localhost:4200", True),
            ("http://prefect.team.example", False),
            ("http://localhost:5000", False),
        ],
    )
    def test_origins(self, origin, fine):
        assert (not self.guard.refusal([(b"host", b"localhost"), (b"origin", origin.encode())])) == fine
