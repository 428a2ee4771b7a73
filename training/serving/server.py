"""One model behind OpenAI's protocol: /v1/chat/completions, /v1/completions, /v1/models, /health.

In: a model in memory, its names, a bound socket. Out: answers over HTTP, whole or streamed, until a signal. For trying
a version and for few users at a time: answers are made one token each in turn, so a long one holds up nobody, but they
share the speed of one; vLLM computes many at once. Limits: those of the desk (429 beyond), `MAX_BODY_BYTES`
in `BODY_SECONDS`, the context length of the model. A client that goes away ends its answer at the next token. Nothing
of this machine is in an answer: errors name fields and limits, details go to the log. Cost: the model in memory.
"""

import asyncio
import ipaddress
from collections.abc import Awaitable
from dataclasses import dataclass
from socket import socket
from typing import Any, TypeVar

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from training.serving.deployed import Deployed, Sampling
from training.serving.desk import Answer, Desk
from training.serving.reply import CHAT, COMPLETION, Reply, Shape
from training.serving.request import ApiError, ChatRequest, CommonRequest, CompletionRequest, parse_request

MAX_BODY_BYTES = 4 << 20
BODY_SECONDS = 30  # for a body to arrive
STOP_SECONDS = 5  # for answers in the making to end, after a signal
GONE = 499  # what nobody reads any more

Result = TypeVar("Result")


@dataclass(frozen=True)
class Names:
    """What clients call the model: its name first, then the exact one (NAME:VERSION), which is in every answer."""

    all: tuple[str, ...]
    created: int  # seconds since 1970

    @property
    def exact(self) -> str:
        return self.all[1]

    def check(self, asked: str) -> None:
        if asked not in self.all:
            known = ", ".join(repr(name) for name in self.all)
            raise ApiError(404, f"model: {asked!r} is not served here; served is {known}", "model", "model_not_found")


def build_app(deployed: Deployed, names: Names, any_host: bool) -> tuple[FastAPI, Desk]:
    """The application, and its desk. `any_host`: clients may call this machine what they like."""
    desk = Desk(deployed)
    app = FastAPI(openapi_url=None, dependencies=[] if any_host else [Depends(_check_host)])
    app.add_exception_handler(ApiError, _say_error)
    app.add_exception_handler(HTTPException, _say_http_error)
    app.add_exception_handler(Exception, _say_failure)
    models = [
        {"id": name, "object": "model", "created": names.created, "owned_by": "panda", "root": names.exact,
         "max_model_len": deployed.context_length}
        for name in names.all
    ]  # fmt: skip

    async def reply(request: Request, asked: CommonRequest, ids: list[int], shape: Shape) -> Response:
        sampling = desk.sampling(asked, ids)
        written = Reply(shape, names.exact, len(ids))
        if asked.stream:
            answer = await _unless_gone(request, desk.begin(ids, sampling))
            events = written.events(answer, asked.stream_options.include_usage)
            stopped = BackgroundTask(_abandon, answer)  # also where nobody has read the first event
            return StreamingResponse(events, media_type="text/event-stream", background=stopped)
        return JSONResponse(await _unless_gone(request, _whole(desk, written, ids, sampling)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parse_request(ChatRequest, await _body(request))
        names.check(asked.model)
        messages = [message.plain() for message in asked.messages]
        return await reply(request, asked, await desk.encode(lambda: deployed.prompt.of_chat(messages)), CHAT)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = parse_request(CompletionRequest, await _body(request))
        names.check(asked.model)
        prompt = asked.prompt
        if isinstance(prompt, str):
            return await reply(request, asked, await desk.encode(lambda: deployed.prompt.of_text(prompt)), COMPLETION)
        return await reply(request, asked, _known(prompt, deployed), COMPLETION)

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": models}

    @app.get("/v1/models/{name:path}")
    def one_model(name: str) -> dict[str, Any]:
        names.check(name)
        return next(model for model in models if model["id"] == name)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app, desk


def serve(deployed: Deployed, names: Names, bound: socket) -> None:
    """Answer at a bound socket until SIGTERM or Ctrl-C."""
    app, desk = build_app(deployed, names, any_host=not is_loopback(bound))

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            desk.closing.set()  # answers end at their next token
            super().handle_exit(sig, frame)

    Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=STOP_SECONDS)).run([bound])


def is_loopback(bound: socket) -> bool:
    """Whether only this machine reaches the socket."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


async def _whole(desk: Desk, reply: Reply, ids: list[int], sampling: Sampling) -> dict[str, Any]:
    answer = await desk.begin(ids, sampling)
    text = "".join([piece async for piece in answer.pieces()])
    assert answer.written is not None, "pieces ended well"
    return reply.whole(text, answer.written)


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of the work, which is given up when the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(GONE, "the client has gone away")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _abandon(answer: Answer) -> None:
    answer.abandoned.set()


async def _body(request: Request) -> bytes:
    """The body. JSON must be declared: a web page of someone else cannot send that without asking first."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Content-Type: must be application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body was not there after {BODY_SECONDS} s") from None
    return bytes(body)


def _known(ids: list[int], deployed: Deployed) -> list[int]:
    """Ids that the model has."""
    size = deployed.model.get_input_embeddings().weight.shape[0]
    if wrong := [number for number, token in enumerate(ids) if not 0 <= token < size]:
        raise ApiError(
            400, f"prompt[{wrong[0]}]: {ids[wrong[0]]} is no token of this model (0 to {size - 1})", "prompt"
        )
    return ids


def _check_host(request: Request) -> None:
    """On loopback only its own names: a page whose name was made to mean this machine (DNS rebinding) has another."""
    host = request.url.hostname or ""
    if host != "localhost" and not _is_loopback_address(host):
        raise ApiError(403, "Host: this server answers to localhost only; start it with --host to be called otherwise")


def _is_loopback_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _say_error(_: Request, error: Any) -> JSONResponse:
    return JSONResponse(error.as_dict(), error.status, {"Retry-After": "5"} if error.status == 429 else None)


async def _say_http_error(request: Request, error: Any) -> JSONResponse:
    what = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, what).as_dict(), error.status_code, error.headers)


async def _say_failure(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(ApiError(500, f"failed ({type(error).__name__}); see the log of the server").as_dict(), 500)
