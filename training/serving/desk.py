"""The desk of a server: takes requests, makes a few answers at a time, lets the others wait in line.

In: ids and sampling of a request. Out: an `Answer`, whose text arrives while it is made. Each answer has a thread; they
use the model by turns, a token each (`turns.py`), so that a long answer holds up nobody. Where nobody reads an answer
any more, or the server is to end, it stops at its next token; after
`MAX_SECONDS` it ends as one that is too long. Cost: the memory of `MAX_ACTIVE` contexts.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from data_prep.tokens.served_prompt import PromptError
from training.serving.deployed import Deployed, Sampling, Written
from training.serving.request import ApiError, CommonRequest
from training.serving.turns import Turns

MAX_ACTIVE = 4  # answers in the making
MAX_WAITING = 32  # requests behind them
MAX_SECONDS = 600  # for an answer, from its first token on

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Answer:
    """An answer in the making: its text arrives in `pieces`, from a thread."""

    queue: "asyncio.Queue[str | Written | Exception]" = field(default_factory=asyncio.Queue)
    abandoned: threading.Event = field(default_factory=threading.Event)
    written: Written | None = None

    async def pieces(self) -> AsyncIterator[str]:
        """Text as it becomes final; afterwards `written` is there."""
        try:
            while isinstance(piece := await self.queue.get(), str):
                yield piece
            if isinstance(piece, Exception):
                logger.error("an answer failed", exc_info=piece)
                raise ApiError(500, f"the model failed ({type(piece).__name__}); see the log of the server")
            if piece.reason == "cancelled":
                raise ApiError(503, "the server is being stopped")
            self.written = piece
        finally:
            self.abandoned.set()


class Desk:
    """Takes requests, a few at a time; the others wait in line."""

    def __init__(self, deployed: Deployed):
        self.deployed = deployed
        self.turns = Turns()
        self.closing = threading.Event()
        self.active = asyncio.Semaphore(MAX_ACTIVE)
        self.encoding = asyncio.Lock()
        self.num_waiting = 0

    async def encode(self, make: Callable[[], list[int]]) -> list[int]:
        """Ids of a prompt, made aside, so that others are answered meanwhile."""
        async with self.encoding:
            try:
                return await asyncio.to_thread(make)
            except PromptError as error:
                raise ApiError(400, str(error), "messages") from error

    def sampling(self, asked: CommonRequest, ids: list[int]) -> Sampling:
        """The sampling of a request whose prompt has these ids, if prompt and answer fit into the context."""
        longest = self.deployed.context_length
        name, wanted = asked.wanted_tokens()
        if not ids:
            raise ApiError(400, "prompt: it has no token, and this model starts with none", "prompt")
        if len(ids) + (wanted or 1) > longest:
            answer = f" and {name}={wanted}" if wanted else ""
            what = f"the prompt has {len(ids)} tokens{answer}; the context of this model has {longest}"
            raise ApiError(400, what, name if wanted else None, "context_length_exceeded")
        return asked.sampling(wanted or longest - len(ids))

    async def begin(self, ids: list[int], sampling: Sampling) -> Answer:
        """An answer in the making, as soon as there is a place."""
        if self.active.locked() and self.num_waiting >= MAX_WAITING:
            raise ApiError(429, f"{MAX_ACTIVE} answers are in the making and {MAX_WAITING} requests wait; try later")
        self.num_waiting += 1
        try:
            await self.active.acquire()
        finally:
            self.num_waiting -= 1
        answer = Answer()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._write, args=(loop, answer, ids, sampling), daemon=True).start()
        return answer

    def _write(self, loop: asyncio.AbstractEventLoop, answer: Answer, ids: list[int], sampling: Sampling) -> None:
        def put(piece: str | Written | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(answer.queue.put_nowait, piece)

        def is_over() -> bool:
            return answer.abandoned.is_set() or self.closing.is_set()

        def go_on() -> bool:
            self.turns.pass_on()
            return not is_over() and time.monotonic() < deadline

        try:
            with self.turns:
                deadline = time.monotonic() + MAX_SECONDS
                written = Written(0, "cancelled") if is_over() else self.deployed.write(ids, sampling, put, go_on)
            if written.reason == "cancelled" and not is_over():
                written = replace(written, reason="length")
            logger.info("%d tokens after a prompt of %d (%s)", written.num_tokens, len(ids), written.reason)
            put(written)
        except Exception as error:  # whatever torch raises; the next request may well succeed
            put(error)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self.active.release)
