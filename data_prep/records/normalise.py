"""One record in any documented shape -> its normal form: a list of (role, text), or the reason why it is rejected.

In: the bytes of one JSON value, or a dict of a user's reader. Out: ``(roles, texts)``, ``roles`` being one byte a text.

    shape                                                       roles
    {"input", "target"}                                         USER ASSISTANT
    {"instruction", "input"?, "output"}                         USER INPUT ASSISTANT (INPUT only if not empty)
    [{"input", "target"}, ...]                                  USER ASSISTANT USER ASSISTANT ...
    {"conversations" | "messages": [{"from", "value"}, ...]}    by `from`: system; human, user; gpt, assistant; ...
    {"conversations" | "messages": [{"role", "content"}, ...]}  by `role`; content: a text or {"type": "text"} parts
    {"title"?, "content"}                                       TITLE TEXT
    {"text"}                                                    TEXT

Any instruction shape may have a "system" text, which comes first. A list of instructions states alternatives: the
content hash picks one. The shapes without a target are read in the instruction directory too (every token is then
a target); the pretraining directory takes only those. An absent field and null are the same. Other fields are ignored.

What is JSON: RFC 8259 in UTF-8. Not accepted: NaN, Infinity, lone surrogates (\\ud800), raw control characters.
Accepted: \\u0000 in a text, repeated keys (the last one counts), numbers of any size in fields that are ignored, and
bytes that are not UTF-8 in fields that are ignored. Cost: about 1.5 us a record.
"""

from enum import IntEnum
from typing import Any

import msgspec
import xxhash

from data_prep.records.reasons import Reason


class Role(IntEnum):
    """What a text of a record is; the values are those of the records files."""

    SYSTEM = 0
    USER = 1
    INPUT = 2  # beside the instruction that is the user's text before it
    ASSISTANT = 3
    TITLE = 4
    TEXT = 5

    @property
    def word(self) -> str:
        """As chat messages name it."""
        return self.name.lower()


SYSTEM, USER, INPUT, ASSISTANT, TITLE, TEXT = Role
Normal = tuple[bytes, list[str]]

SPEAKERS = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "human": USER,
    "user": USER,
    "prompter": USER,
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "bard": ASSISTANT,
    "bing": ASSISTANT,
}
_TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}
_PAIR = bytes((USER, ASSISTANT))
_TRIPLE = bytes((USER, INPUT, ASSISTANT))
_TITLED = bytes((TITLE, TEXT))
_TEXT = bytes((TEXT,))
_SYSTEM = bytes((SYSTEM,))


class Rejected(Exception):
    """A record that cannot be used: the reason and, for people, what exactly is wrong."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Row(msgspec.Struct, gc=False):
    """The fields of all shapes, untyped: what is wrong with one is only looked at where the shape needs it."""

    input: Any = None
    target: Any = None
    instruction: Any = None
    output: Any = None
    conversations: Any = None
    messages: Any = None
    system: Any = None
    title: Any = None
    content: Any = None
    text: Any = None


_decode_row = msgspec.json.Decoder(Row).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode_texts = msgspec.msgpack.Encoder().encode


def decode(data: bytes | msgspec.Raw) -> Row | list:
    """The record in ``data``: a Row, or the list of turns it is.

    :raises Rejected: malformed_json, invalid_utf8, or unknown_shape for a number, a string, true, null.
    """
    try:
        return _decode_known(data)
    except UnicodeDecodeError as error:
        raise Rejected(Reason.INVALID_UTF8, f"byte {error.object[error.start]:#04x} in a text") from None
    except msgspec.DecodeError as error:
        raise Rejected(Reason.MALFORMED_JSON, str(error)) from None
    except RecursionError:
        raise Rejected(Reason.MALFORMED_JSON, "nested too deeply") from None


def from_mapping(record: Any) -> Row | list:
    """The same for what a user's reader yields."""
    if isinstance(record, dict):
        return Row(**{name: record.get(name) for name in Row.__struct_fields__})
    return record if isinstance(record, list) else _unknown(record)


def normalise(row: Row | list, kind: str) -> Normal:
    """``kind`` is ``instruction`` or ``pretraining``.

    :raises Rejected: unknown_shape, missing_field, wrong_type, empty_target.
    """
    if kind == "pretraining":
        return _document(row)
    if isinstance(row, list):
        return _turns(row)
    if row.conversations is not None or row.messages is not None:
        roles, texts = _chat(row)
    elif row.instruction is not None:
        roles, texts = _instruction(row)
    elif row.target is not None or row.input is not None:
        roles, texts = _PAIR, [_string(row.input, "input"), _target(row.target, "target")]
    else:
        return _document(row)
    if row.system:
        return _SYSTEM + roles, [_string(row.system, "system"), *texts]
    return roles, texts


def content_hash(roles: bytes, texts: list[str]) -> bytes:
    """16 bytes, equal for equal normal forms: the key of duplicates and of the validation split.

    :raises Rejected: invalid_utf8, for a lone surrogate that a user's reader let through.
    """
    try:
        return xxhash.xxh3_128_digest(roles + _encode_texts(texts))
    except UnicodeEncodeError:
        raise Rejected(Reason.INVALID_UTF8, "a lone surrogate in a text") from None


def _decode_known(data: bytes | msgspec.Raw) -> Row | list:
    try:
        return _decode_row(data)
    except msgspec.ValidationError:
        return _decode_other(data)  # which may still be malformed: the first problem that is met is named


def _decode_other(data: bytes | msgspec.Raw) -> Row | list:
    """JSON that is no object, or an object with a number beyond 64 bits."""
    try:
        fields = _decode_fields(data)
    except msgspec.ValidationError:
        value = _decode_any(data)
        return value if isinstance(value, list) else _unknown(value)
    return Row(**{name: _decode_any(fields[name]) for name in Row.__struct_fields__ if name in fields})


def _decode_any(data: bytes | msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(data)
    except UnicodeDecodeError as error:
        raise Rejected(Reason.INVALID_UTF8, f"byte {error.object[error.start]:#04x} in a text") from None
    except msgspec.ValidationError:
        return 0  # a number beyond 64 bits: of the wrong type wherever it matters
    except msgspec.DecodeError as error:
        raise Rejected(Reason.MALFORMED_JSON, str(error)) from None
    except RecursionError:
        raise Rejected(Reason.MALFORMED_JSON, "nested too deeply") from None


def _unknown(value: Any) -> Row | list:
    raise Rejected(Reason.UNKNOWN_SHAPE, f"a record is an object or a list of turns, not {_type_name(value)}")


def _document(row: Row | list) -> Normal:
    if isinstance(row, list):
        raise Rejected(Reason.UNKNOWN_SHAPE, "a list of turns in the pretraining directory")
    if row.content is not None:
        content = _target(row.content, "content")
        if row.title is None or row.title == "":
            return _TEXT, [content]
        return _TITLED, [_string(row.title, "title"), content]
    if row.text is not None:
        return _TEXT, [_target(row.text, "text")]
    if row.title is not None:
        raise Rejected(Reason.MISSING_FIELD, '"content" is absent beside "title"')
    found = [name for name in Row.__struct_fields__ if getattr(row, name) is not None]
    raise Rejected(Reason.UNKNOWN_SHAPE, f"has only {', '.join(found)}" if found else "no known field")


def _instruction(row: Row) -> Normal:
    instruction = row.instruction
    output = _target(row.output, "output")
    if type(instruction) is list:
        instruction = _alternative(instruction, output)
    elif type(instruction) is not str:
        _wrong_type(instruction, "instruction")
    if row.input is None or row.input == "":
        return _PAIR, [instruction, output]
    return _TRIPLE, [instruction, _string(row.input, "input"), output]


def _alternative(instructions: list, output: str) -> str:
    texts = [_string(text, "instruction") for text in instructions]
    if not texts:
        raise Rejected(Reason.MISSING_FIELD, '"instruction" is an empty list')
    return texts[xxhash.xxh3_64_intdigest(_encode_texts([*texts, output])) % len(texts)]


def _turns(turns: list) -> Normal:
    texts: list[str] = []
    for turn in turns:
        if type(turn) is not dict:
            raise Rejected(Reason.WRONG_TYPE, f"a turn is {_type_name(turn)}, not an object")
        texts += (_string(turn.get("input"), "input"), _target(turn.get("target"), "target"))
    if not texts:
        raise Rejected(Reason.EMPTY_TARGET, "no turn at all")
    return _PAIR * len(turns), texts


def _chat(row: Row) -> Normal:
    name = "messages" if row.conversations is None else "conversations"
    turns = getattr(row, name)
    if type(turns) is not list:
        _wrong_type(turns, name, "a list")
    roles, texts = bytearray(), []
    for turn in turns:
        role, text = _turn(turn)
        roles.append(role)
        texts.append(text)
    if ASSISTANT not in roles:
        raise Rejected(Reason.EMPTY_TARGET, "no assistant turn")
    return bytes(roles), texts


def _turn(turn: Any) -> tuple[int, str]:
    if type(turn) is not dict:
        raise Rejected(Reason.WRONG_TYPE, f"a turn is {_type_name(turn)}, not an object")
    speaker_field, text_field = ("from", "value") if "from" in turn else ("role", "content")
    speaker = _string(turn.get(speaker_field), speaker_field)
    role = SPEAKERS.get(speaker)
    if role is None:
        raise Rejected(Reason.UNKNOWN_SHAPE, f'"{speaker_field}" is "{speaker[:40]}", not one of {", ".join(SPEAKERS)}')
    text = turn.get(text_field)
    if type(text) is list:
        text = "".join(_part(part) for part in text)
    return role, _target(text, text_field) if role == ASSISTANT else _string(text, text_field)


def _part(part: Any) -> str:
    if type(part) is not dict or part.get("type") != "text":
        raise Rejected(Reason.UNKNOWN_SHAPE, 'a part of a content is not {"type": "text", "text": ...}')
    return _string(part.get("text"), "text")


def _string(value: Any, name: str) -> str:
    return value if type(value) is str else _wrong_type(value, name)


def _target(value: Any, name: str) -> str:
    if type(value) is not str:
        return _wrong_type(value, name)
    if not value or value.isspace():
        raise Rejected(Reason.EMPTY_TARGET, f'"{name}" is empty')
    return value


def _wrong_type(value: Any, name: str, wanted: str = "a string") -> str:
    if value is None:
        raise Rejected(Reason.MISSING_FIELD, f'"{name}" is absent')
    raise Rejected(Reason.WRONG_TYPE, f'"{name}" is {_type_name(value)}, not {wanted}')


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), type(value).__name__)
