"""The turns of a conversation -> roles and texts; and what every text of a record is called and may be.

In: the list beside "messages" or "conversations", as decoded. Out: ``(roles, texts)``, one role a text.

    a turn                                               becomes
    {"role": "user", "content": "a"}                     USER "a"
    {"role": "assistant", "content": "b"}                ASSISTANT "b", a target
    {"from": "gpt", "value": "b", "weight": 0}           ANSWERED "b", context: also weight, loss, train, loss_weight
    {"role": "assistant", "content": ""}                 ANSWERED "": nothing to learn, but said
    {"role": "assistant", "content": "b",                FIELDS {"reasoning_content": "r"}, ASSISTANT "b"
     "reasoning_content": "r"}
    {"role": "assistant", "tool_calls": [...]}           FIELDS {"tool_calls": [...]}, ASSISTANT ""
    {"from": "function_call", "value": "{...}"}          the same; several in a row are one turn
    {"role": "tool", "content": "c", "name": "f"}        FIELDS {"name": "f"}, RESULT "c"

FIELDS is the JSON of what else belongs to the message that follows. A weight is 0 or 1; any other is refused, because
the loss knows targets and others. Keys that nothing is made of are named to the caller, with their place
(``messages[].id``). Cost: about 0.3 us a turn of two keys.
"""

from enum import IntEnum
from typing import Any

import msgspec

from data_prep.records.reasons import Reason


class Role(IntEnum):
    """What a text of a record is; the values are those of the records files."""

    SYSTEM = 0
    USER = 1
    INPUT = 2  # beside the instruction that is the user's text before it
    ASSISTANT = 3
    TITLE = 4
    TEXT = 5
    ANSWERED = 6  # an answer that is context: its weight is 0, or it is empty
    RESULT = 7  # what a tool gave back
    FIELDS = 8  # JSON: the other fields of the message that follows
    TOOLS = 9  # JSON: the list of tools that may be called

    @property
    def word(self) -> str:
        """As chat messages name it."""
        return _WORDS.get(self, self.name.lower())


_WORDS = {Role.ANSWERED: "assistant", Role.RESULT: "tool"}
ASSISTANT, ANSWERED, FIELDS = Role.ASSISTANT, Role.ANSWERED, Role.FIELDS
Normal = tuple[bytes, list[str]]

_CALL = -1  # an answer that is nothing but the call of a tool
SPEAKERS: dict[str, int] = {
    **dict.fromkeys(("system", "developer"), Role.SYSTEM),
    **dict.fromkeys(("human", "user", "prompter"), Role.USER),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "bard", "bing"), Role.ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function", "tool_response"), Role.RESULT),
    **dict.fromkeys(("function_call", "tool_call"), _CALL),
}
WEIGHTS = ("weight", "loss", "train", "loss_weight")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class Rejected(Exception):
    """A record that cannot be used: the reason and, for people, what exactly is wrong."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def conversation(turns: Any, name: str, unread: list[str]) -> Normal:
    """Roles and texts of all turns.

    :param name: of the field, for messages and for the keys that are added to ``unread``.
    :raises Rejected: unknown_shape, missing_field, wrong_type, unsupported_weight; empty_target if no answer is one.
    """
    if type(turns) is not list:
        wrong_type(turns, name, "a list")
    roles, texts = bytearray(), list[str]()
    calls: list[Any] | None = None  # of the turn before, if it was nothing but a call
    for turn in turns:
        if type(turn) is not dict:
            raise Rejected(Reason.WRONG_TYPE, f"a turn is {type_name(turn)}, not an object")
        speaker_field, text_field = ("from", "value") if "from" in turn else ("role", "content")
        speaker = string(turn.get(speaker_field), speaker_field)
        role = SPEAKERS.get(speaker)
        if role is None:
            known = ", ".join(SPEAKERS)
            raise Rejected(Reason.UNKNOWN_SHAPE, f'"{speaker_field}" is "{speaker[:40]}", not one of {known}')
        text = turn.get(text_field)
        fields: dict[str, Any] = {}
        if len(turn) > 2 or type(text) is not str or role < 0:
            role, text, fields = _unusual(turn, role, (speaker_field, text_field), f"{name}[]", unread)
        if role == ASSISTANT and not fields and is_blank(text):
            role = ANSWERED
        is_call = SPEAKERS[speaker] == _CALL
        if is_call and calls is not None and roles[-1] == role:
            calls += fields["tool_calls"]
            texts[-2] = _json({"tool_calls": calls})
            continue
        calls = fields["tool_calls"] if is_call else None
        if fields:
            roles.append(FIELDS)
            texts.append(_json(fields))
        roles.append(role)
        texts.append(text)
    if ASSISTANT not in roles:
        raise Rejected(Reason.EMPTY_TARGET, "no assistant turn with a text and a weight above 0")
    return bytes(roles), texts


def pairs(turns: list, unread: list[str]) -> Normal:
    """A list of {"input", "target"}, which may have weights.

    :raises Rejected: as `conversation`.
    """
    roles, texts = bytearray(), list[str]()
    for turn in turns:
        if type(turn) is not dict:
            raise Rejected(Reason.WRONG_TYPE, f"a turn is {type_name(turn)}, not an object")
        asked, answer = string(turn.get("input"), "input"), string(turn.get("target"), "target")
        is_target = not is_blank(answer)
        if len(turn) > 2:
            is_target = weight_of(turn) is not False and is_target
            unread += [f"[].{key}" for key in turn.keys() - {"input", "target", *WEIGHTS} if turn[key] is not None]
        roles += bytes((Role.USER, ASSISTANT if is_target else ANSWERED))
        texts += (asked, answer)
    if ASSISTANT not in roles:
        raise Rejected(Reason.EMPTY_TARGET, "no turn has a target" if turns else "no turn at all")
    return bytes(roles), texts


def tool_list(value: Any, name: str) -> str:
    """The JSON of a list of tools, each as {"type": "function", "function": {...}}; "" for none.

    :param value: a list of objects, or the JSON text of one.
    """
    found = _parsed(value, name, "a list of tools")
    if is_nothing(found):
        return ""
    if type(found) is not list:
        wrong_type(found, name, "a list")
    wrapped = []
    for tool in found:
        if type(tool) is not dict:
            wrong_type(tool, f"{name}[]", "an object")
        wrapped.append(tool if "function" in tool or "type" in tool else {"type": "function", "function": tool})
    return _json(wrapped)


def weight_of(turn: dict[str, Any]) -> bool | None:
    """Whether a turn is trained, if it says so.

    :raises Rejected: unsupported_weight, for another weight than 0 and 1, or for two that differ.
    """
    said = [(key, value) for key in WEIGHTS if (value := turn.get(key)) is not None]
    for key, value in said:
        if type(value) not in (bool, int, float):
            wrong_type(value, key, "0 or 1")
        if value not in (0, 1):
            raise Rejected(Reason.UNSUPPORTED_WEIGHT, f'"{key}" is {value}; a token is a target or it is not: 0 or 1')
    weights = {bool(value) for _, value in said}
    if len(weights) > 1:
        raise Rejected(Reason.UNSUPPORTED_WEIGHT, f"{' and '.join(key for key, _ in said)} contradict each other")
    return weights.pop() if weights else None


def is_nothing(value: Any) -> bool:
    """Whether a value says no more than an absent one: null, or an empty text, list or object."""
    return value is None or (type(value) in (str, list, dict) and not value)


def is_blank(text: str) -> bool:
    """Whether there is nothing to learn from a text."""
    return not text or text.isspace()


def string(value: Any, name: str) -> str:
    """The value, which must be a string."""
    return value if type(value) is str else wrong_type(value, name)


def target(value: Any, name: str) -> str:
    """The value, which must be a string with something in it."""
    if type(value) is not str:
        return wrong_type(value, name)
    if not value or value.isspace():
        raise Rejected(Reason.EMPTY_TARGET, f'"{name}" is empty')
    return value


def wrong_type(value: Any, name: str, wanted: str = "a string") -> Any:
    """Refuse a value: it is absent, or not what it must be."""
    if value is None:
        raise Rejected(Reason.MISSING_FIELD, f'"{name}" is absent')
    raise Rejected(Reason.WRONG_TYPE, f'"{name}" is {type_name(value)}, not {wanted}')


def type_name(value: Any) -> str:
    """As people call the type of a JSON value."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def _unusual(
    turn: dict[str, Any], role: int, named: tuple[str, str], place: str, unread: list[str]
) -> tuple[int, str, dict[str, Any]]:
    """A turn that is more than a speaker and a text: its role, its text, and its FIELDS."""
    left = {key: value for key, value in turn.items() if value is not None and key not in named}
    value = turn.get(named[1])
    fields: dict[str, Any] = {}
    if role == _CALL:
        fields["tool_calls"] = _calls(_parsed(value, named[1], "a call"), place, unread)
        value = ""
    elif role == ASSISTANT:
        _take_answer_fields(left, fields, place, unread)
    elif role == Role.RESULT:
        fields |= {key: string(left.pop(key), key) for key in ("name", "tool_call_id") if key in left}
    text = _text_of(value, named[1], place, unread, may_be_absent="tool_calls" in fields)
    weight = weight_of(left)
    unread += [f"{place}.{key}" for key in left if key not in WEIGHTS]
    if role not in (_CALL, ASSISTANT):
        if weight:
            raise Rejected(Reason.UNSUPPORTED_WEIGHT, f"a {Role(role).word} turn asks to be trained; only answers are")
        return role, text, fields
    nothing = is_blank(text) and "tool_calls" not in fields
    return (ANSWERED if weight is False or nothing else ASSISTANT), text, fields


def _take_answer_fields(left: dict[str, Any], fields: dict[str, Any], place: str, unread: list[str]) -> None:
    thoughts = next((key for key in THOUGHTS if key in left), None)
    if thoughts is not None and (text := string(left.pop(thoughts), thoughts)):
        fields["reasoning_content"] = text
    for key in ("tool_calls", "function_call"):
        if key in left and (is_nothing(left[key]) or "tool_calls" not in fields):
            calls = left.pop(key)
            fields |= {} if is_nothing(calls) else {"tool_calls": _calls(calls, place, unread)}


def _calls(value: Any, place: str, unread: list[str]) -> list[dict[str, Any]]:
    """Calls as chat templates take them: {"id"?, "type": "function", "function": {"name", "arguments": {...}}}."""
    calls = []
    for call in value if type(value) is list else [value]:
        if type(call) is not dict:
            wrong_type(call, "tool_calls[]", "an object")
        function = call.get("function", call)
        if type(function) is not dict:
            wrong_type(function, "function", "an object")
        arguments = _parsed(function.get("arguments"), "arguments", "an object")
        if type(arguments) is not dict:
            wrong_type(arguments, "arguments", "an object")
        identity = {"id": string(call["id"], "id")} if call.get("id") is not None else {}
        named = {"name": string(function.get("name"), "name"), "arguments": arguments}
        calls.append({**identity, "type": "function", "function": named})
        flat = function is call
        more = call.keys() - {"id", "type", *(("name", "arguments") if flat else ("function",))}
        more |= set() if flat else function.keys() - {"name", "arguments"}
        unread += [f"{place}.tool_calls[].{key}" for key in more]
    if not calls:
        raise Rejected(Reason.MISSING_FIELD, '"tool_calls" is an empty list')
    return calls


def _text_of(value: Any, name: str, place: str, unread: list[str], may_be_absent: bool) -> str:
    if type(value) is list:
        return "".join(_part(part, f"{place}.{name}[]", unread) for part in value)
    return "" if value is None and may_be_absent else string(value, name)


def _part(part: Any, place: str, unread: list[str]) -> str:
    if type(part) is not dict or part.get("type") != "text":
        raise Rejected(Reason.UNKNOWN_SHAPE, 'a part of a content is not {"type": "text", "text": ...}')
    unread += [f"{place}.{key}" for key in part if key not in ("type", "text") and part[key] is not None]
    return string(part.get("text"), "text")


def _parsed(value: Any, name: str, wanted: str) -> Any:
    """The value, or what its text says where it is one."""
    if type(value) is not str or not value.strip():
        return None if value == "" else value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeError, RecursionError):
        raise Rejected(Reason.WRONG_TYPE, f'"{name}" is a text that is not the JSON of {wanted}') from None


def _json(value: Any) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except UnicodeEncodeError:
        raise Rejected(Reason.INVALID_UTF8, "a lone surrogate in a text") from None
