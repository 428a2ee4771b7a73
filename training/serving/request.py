"""What an OpenAI client may ask for, checked; and what it is told when something is wrong with it.

In: the bytes of a body. Out: `ChatRequest` or `CompletionRequest`, or an `ApiError` that names the field. What would
change the answer and is not done here is refused, never overlooked; what only labels a request is ignored. Cost: none.
"""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from training.serving.deployed import Sampling

MAX_MESSAGES = 500  # each earlier answer costs a rendering of the template
MAX_STOPS = 16
MIN_TEMPERATURE = 1e-3  # below it the likeliest token is as good as certain
LABELS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that are not offered, and the values that ask for nothing
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False, 0), "top_logprobs": (0,),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip
Request = TypeVar("Request", bound="CommonRequest")


class ApiError(Exception):
    """An answer that is no success, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def as_dict(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients turn into their exceptions."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """`include_obfuscation` pads OpenAI's chunks; there is nothing to hide here."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of text; `developer` is what newer clients call the system."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None  # a label

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class CommonRequest(_Strict):
    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] = []

    def wanted_tokens(self) -> tuple[str, int | None]:
        """Which field limits the answer, and to what."""
        return "max_tokens", self.max_tokens

    def sampling(self, max_tokens: int) -> Sampling:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stops) > MAX_STOPS or not all(stops):
            raise ApiError(400, f"stop: at most {MAX_STOPS} strings, none of them empty", "stop")
        temperature = self.temperature if self.temperature >= MIN_TEMPERATURE else 0.0
        return Sampling(max_tokens, temperature, self.top_p, self.seed, tuple(stops))


class ChatRequest(CommonRequest):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)

    def wanted_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().wanted_tokens()


class CompletionRequest(CommonRequest):
    """The body of /v1/completions; the prompt is a text or its ids."""

    prompt: str | list[int]


def parse_request(kind: type[Request], body: bytes) -> Request:
    """A checked request.

    :raises ApiError: not JSON, or a field is missing, unknown, not offered, or has a wrong value.
    """
    try:
        given = from_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ApiError(400, "the body must be a JSON object")
    asked = {name: value for name, value in given.items() if value is not None and name not in LABELS}
    for name in NEUTRAL.keys() & asked.keys():
        if asked.pop(name) not in NEUTRAL[name]:
            raise ApiError(400, f"{name}: not offered by this server; leave it out, or use vLLM", name)
    try:
        return kind.model_validate(asked)
    except ValidationError as error:
        raise _named(error) from error


def _named(error: ValidationError) -> ApiError:
    """The problem, with the field it is about; where a field has several forms, the form that fits best."""
    first = max(error.errors(include_url=False, include_input=False), key=lambda problem: len(problem["loc"]))
    parts = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith(("list[", "str")))]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    what = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
    return ApiError(400, f"{field}: {what}", field)
