"""What stands before a Prefect server: requests that somebody else's web page makes a browser send get 403.

In: an ASGI application, and the addresses at which people see it. Out: an ASGI application. Prefect itself accepts
every `Host` (so a name of the attacker's may lead here) and leaves `Origin` to the browser, which asks for no leave
before a plain POST or a WebSocket. Browsers set both headers, and no page can change them. Cost: none.
"""

import re
from typing import Any
from urllib.parse import urlsplit

from training.launch.processes import LOOPBACK

HOST = re.compile(r"([a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::\d+)?")


def origins(port: int, seen_at: list[str]) -> list[str]:
    """Our own pages: on loopback, and at the addresses at which people see this server."""
    own = {f"http://{name}:{port}" for name in LOOPBACK[:2]}
    return sorted(own | {f"{urlsplit(url).scheme}://{urlsplit(url).netloc}" for url in seen_at if urlsplit(url).netloc})


class Guard:
    """An application that only our own pages, and programs, can reach."""

    def __init__(self, app: Any, allowed: list[str]):
        self.app = app
        self.origins = {origin.lower() for origin in allowed}
        self.hosts = {urlsplit(origin).hostname for origin in allowed}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refusal = "" if scope["type"] == "lifespan" else self.refusal(scope["headers"])
        if not refusal:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal})  # before accept: a 403
        else:
            body = refusal.encode()
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def refusal(self, headers: list[tuple[bytes, bytes]]) -> str:
        """Why a request with these headers is refused; empty when it is not."""
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if len(hosts) != 1 or _name(hosts[0]) not in self.hosts:
            return f"Host {', '.join(hosts)!r} is not an address of this server (PREFECT_UI_API_URL)"
        for name, value in headers:
            if name == b"origin" and "*" not in self.origins and value.decode("latin-1").lower() not in self.origins:
                return f"Origin {value.decode('latin-1')!r}: only pages of this server may use it (PREFECT_UI_API_URL)"
        return ""


def _name(host: str) -> str | None:
    """Without the port; None for what is no host."""
    match = HOST.fullmatch(host.lower())
    return match[1].strip("[]") if match else None
