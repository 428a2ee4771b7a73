"""The JSON of OpenAI's answers: whole, or as server-sent events.

In: an `Answer` in the making. Out: dictionaries and events; the chat and the completion endpoint differ in where the
text is. Cost: none.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from training.serving.deployed import Written
from training.serving.desk import Answer
from training.serving.request import ApiError


@dataclass(frozen=True)
class Shape:
    """How an endpoint writes its answers: the two differ in where the text is."""

    prefix: str
    whole: str
    chunk: str
    text: Callable[[str], dict[str, Any]]
    delta: Callable[[str], dict[str, Any]]
    last: dict[str, Any]
    first: dict[str, Any] | None = None


CHAT = Shape(
    "chatcmpl", "chat.completion", "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}}, lambda text: {"delta": {"content": text}},
    last={"delta": {}}, first={"delta": {"role": "assistant", "content": ""}},
)  # fmt: skip
COMPLETION = Shape(
    "cmpl", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text},
    last={"text": ""},
)  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """Writes the JSON of one reply."""

    shape: Shape
    model: str
    num_prompt: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _of(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": f"{self.shape.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}

    def usage(self, written: Written) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": written.num_tokens,
            "total_tokens": self.num_prompt + written.num_tokens,
        }

    def whole(self, text: str, written: Written) -> dict[str, Any]:
        choice = {"index": 0, **self.shape.text(text), "logprobs": None, "finish_reason": written.reason}
        return self._of(self.shape.whole, [choice], usage=self.usage(written))

    def chunk(self, content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return self._of(self.shape.chunk, [{"index": 0, **content, "logprobs": None, "finish_reason": reason}])

    async def events(self, answer: Answer, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events."""
        try:
            if self.shape.first:
                yield _event(self.chunk(self.shape.first))
            async for piece in answer.pieces():
                yield _event(self.chunk(self.shape.delta(piece)))
            assert answer.written is not None, "pieces ended well"
            yield _event(self.chunk(self.shape.last, answer.written.reason))
            if with_usage:
                yield _event(self._of(self.shape.chunk, [], usage=self.usage(answer.written)))
        except ApiError as error:
            yield _event(error.as_dict())
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
