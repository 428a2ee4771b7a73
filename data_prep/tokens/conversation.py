"""The layout of one record that has tools or thoughts, from its own rendering; no pattern of roles can tell it.

In: a chat template, the roles and texts of a record. Out: its `Layout`, and the texts of its slots. The template is
given what transformers gives it (messages with ``tool_calls`` and ``reasoning_content``, the list of tools). An answer
is what stands between the prompt for it and the first token at which generation stops; it is refused unless

    1. the rendering up to an answer, as generation asks for it, is a prefix of the whole rendering;
    2. no trained answer changes once it is not the last, as where a template leaves out the thoughts of earlier turns
       (`train_on: last` then trains the last one);
    3. every text, every tool and every call of the record is in the rendering, changed at most by stripping white
       space or by writing it as JSON.

Tools and their results are never targets. An answer that is only context is tokenized as it was generated where 1 and 2
hold for it, else as the template shows it later. Text of special tokens inside the record stays text: it is replaced by
marks before rendering, which become slots. Cost: two renderings an answer, about 0.3 ms each.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from data_prep.records.turns import Role
from data_prep.tokens.chat_template import ChatTemplate, Messages, Roles, end_pattern, refused, rendered
from data_prep.tokens.layouts import Layout, Refusal, Run, Slot

ANSWERS = (Role.ASSISTANT, Role.ANSWERED)
TOOL_ROLES = (Role.TOOLS, Role.RESULT)
_MARK = re.compile(r"⟦special(\d+)⟧")
_THOUGHTS = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*(.*)", re.DOTALL)


class _Conversation:
    """A record as a chat template sees it, and what must be found in its rendering."""

    def __init__(self, chat: ChatTemplate, roles: Roles, texts: list[str], reasoning: str):
        self.chat, self.roles, self.reasoning = chat, roles, reasoning
        self.special: list[str] = []  # the texts of special tokens that the record says
        self.messages: Messages = []
        self.speakers: list[int] = []
        self.thoughts: list[str] = []  # of each message, "" for none
        self.tools: list[Any] | None = None
        fields: dict[str, Any] = {}
        for role, text in zip(roles, texts, strict=True):
            if role == Role.TOOLS:
                self.tools = self._protected(json.loads(text))
            elif role == Role.FIELDS:
                fields = json.loads(text)
            elif role == Role.INPUT and not chat.names_input:
                self.messages[-1]["content"] += "\n" + self._protected(text)
            else:
                self._add(role, text, fields)
                fields = {}

    def _add(self, role: int, text: str, fields: dict[str, Any]) -> None:
        thoughts = fields.pop("reasoning_content", "")
        is_inline = not thoughts and role in ANSWERS and "</think>" in text
        if is_inline and (self.reasoning != "train" or self.chat.reads_thoughts):
            found = _THOUGHTS.match(text)
            assert found is not None, "the text has a closing tag"
            thoughts, text = found[1].strip(), found[2]
        thoughts, text, fields = self._protected(thoughts), self._protected(text), self._protected(fields)
        if thoughts and self.reasoning == "drop":
            thoughts = ""
        elif thoughts and self.chat.reads_thoughts:
            fields["reasoning_content"] = thoughts
        elif thoughts:
            text = f"<think>\n{thoughts}\n</think>\n\n{text}"
        self.messages.append({"role": Role(role).word, "content": text, **fields})
        self.speakers.append(role)
        self.thoughts.append(thoughts)

    def _protected(self, value: Any) -> Any:
        """The value with marks in place of what the tokenizer would take for a special token."""
        if isinstance(value, str):
            return self.chat.special.sub(self._mark, value)
        if isinstance(value, list):
            return [self._protected(one) for one in value]
        if isinstance(value, dict):
            return {self._protected(key): self._protected(one) for key, one in value.items()}
        return value

    def _mark(self, found: re.Match[str]) -> str:
        self.special.append(found[0])
        return f"⟦special{len(self.special) - 1}⟧"

    def render(self, num_messages: int | None = None, add_generation_prompt: bool = False) -> str:
        messages = self.messages[:num_messages]
        return rendered(self.chat, messages, add_generation_prompt, self.roles, self.tools)

    def write_calls_as_openai(self) -> None:
        """Arguments as JSON text, and no content beside a call: some templates take them only so."""
        for message in self.messages:
            for call in message.get("tool_calls", []):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                message["content"] = message["content"] or None


def record_layout(
    chat: ChatTemplate, roles: Roles, texts: list[str], reasoning: str, adds_bos: bool
) -> tuple[Layout, list[str]]:
    """The layout of a record and the texts of its slots.

    :raises Refusal: the template cannot express the record, or its answers cannot be found with proof.
    """
    told = _Conversation(chat, roles, texts, reasoning)
    has_calls = any("tool_calls" in message for message in told.messages)
    if (has_calls or any(role in TOOL_ROLES for role in roles)) and "tool" not in chat.source:
        raise refused(roles, "it has no place for tools")
    try:
        runs = _runs(told)
    except Refusal as refusal:
        if not has_calls:
            raise
        try:
            told.write_calls_as_openai()
            runs = _runs(told)
        except Refusal:
            raise refusal from None
    return Layout(tuple(runs), adds_bos), told.special


def _runs(told: _Conversation) -> list[Run]:
    whole = told.render()
    _check_tools(told, whole)
    runs: list[Run] = []
    at = 0
    for number, role in enumerate(told.speakers):
        if role not in ANSWERS:
            _check_shown(told, told.messages[number]["content"], whole, number)
            continue
        try:
            start, stop, end = _find(told, whole, number, at)
        except Refusal:
            if role == Role.ASSISTANT:
                raise
            continue
        runs.append(_run(whole[at:start], False))
        runs += _answer(told, whole[start:stop], number, told.chat.ends[end])
        at = stop + len(end)
    while runs and not runs[-1].target:
        runs.pop()
    return runs


def _find(told: _Conversation, whole: str, number: int, at: int) -> tuple[int, int, str]:
    """Where the answer begins and ends, and the stop token that ends it."""
    prompt = told.render(number, add_generation_prompt=True)
    if not whole.startswith(prompt) or len(prompt) < at:
        raise refused(told.roles, f"it is not prefix-stable: asked to answer, it renders …{prompt[-80:]!r}")
    found = end_pattern(told.chat).search(whole, len(prompt))
    upto = told.render(number + 1)
    if found is None or found.end() > len(upto):
        raise refused(told.roles, f"no stop token ({', '.join(told.chat.ends)}) follows an answer")
    if not upto.startswith(whole[: found.end()]):
        why = f"as the last one an answer is …{upto[-80:]!r}, later …{whole[: found.end()][-80:]!r}"
        raise refused(told.roles, f"it is not prefix-stable: {why}; train_on: last trains the last one alone")
    return len(prompt), found.start(), found[0]


def _answer(told: _Conversation, text: str, number: int, end_id: int) -> Iterator[Run]:
    """The runs of one answer: one, or two where its thoughts are context."""
    message, thoughts = told.messages[number], told.thoughts[number].strip()
    is_target = told.speakers[number] == Role.ASSISTANT
    if is_target:
        _check_shown(told, message["content"], text, number)
        _check_shown(told, thoughts, text, number)
        for call in message.get("tool_calls", []):
            for leaf in _leaves(call["function"]):
                _check_shown(told, leaf, text, number)
    if is_target and thoughts and told.reasoning == "mask":
        after = text.index(thoughts) + len(thoughts)
        after += len(text[after:]) - len(text[after:].lstrip())
        yield _run(text[:after], False)
        text = text[after:]
    yield _run(text, is_target, end_id)


def _run(text: str, is_target: bool, end_id: int | None = None) -> Run:
    """A run whose marks are slots again."""
    pieces = _MARK.split(text)
    parts = [Slot(int(piece)) if number % 2 else piece for number, piece in enumerate(pieces)]
    return Run(is_target, tuple(part for part in parts if part != ""), end_id)


def _check_tools(told: _Conversation, whole: str) -> None:
    if told.tools and rendered(told.chat, told.messages, False, told.roles) == whole:
        raise refused(told.roles, "it leaves out the tools")
    for tool in told.tools or []:
        name = tool.get("function", tool).get("name", "") if isinstance(tool, dict) else ""
        if str(name) not in whole:
            raise refused(told.roles, f"it leaves out the tool {name!r}")


def _check_shown(told: _Conversation, text: str | None, segment: str, number: int) -> None:
    """Condition 3 for one text."""
    text = (text or "").strip()
    forms = (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    if not any(form in segment for form in forms):
        raise refused(told.roles, f"it leaves out or rewrites a text of message {number + 1}: {text[:80]!r}")


def _leaves(value: Any) -> Iterator[str]:
    """All texts and numbers of a call, as JSON shows them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from (() if key in ("name", "arguments") else (key,))
            yield from _leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one)
    else:
        yield json.dumps(value)
