"""One record in any documented shape -> its normal form: a list of (role, text), or the reason why it is rejected.

In: the bytes of one JSON value, or a dict of a user's reader. Out: ``(roles, texts)``, ``roles`` being one byte a text.

    shape                                                       roles
    {"input", "target"}                                         USER ASSISTANT
    {"instruction", "input"?, "output"}                         USER INPUT ASSISTANT (INPUT only if not empty)
    {"instruction", "context"?, "response"}                     the same
    {"prompt", "completion"}, {"prompt" | "query", "response"}, {"question", "answer"}      USER ASSISTANT
    {"prompt": [turns], "completion": [turns]}                  as messages; only answers of the completion are targets
    [{"input", "target"}, ...]                                  USER ASSISTANT USER ASSISTANT ...
    {"conversations" | "messages": [turns]}                     `data_prep.records.turns`
    {"title"?, "content"}                                       TITLE TEXT
    {"text"}                                                    TEXT

Any instruction shape may have a "system" text, which comes first, a "history" of [question, answer] pairs before the
question, whose answers are targets too, and a list of "tools" (or "functions"), which comes before all. A list of
instructions states alternatives: the content hash picks one. The shapes without a target are read in the instruction
directory too (every token is then a target); the pretraining directory takes only those. An absent field and null are
the same. Fields that mean training of another kind (pairs of answers to prefer, images) are refused; every other field
that nothing is made of is named to the caller. Fields may have other names in a corpus: ``columns``.

What is JSON: RFC 8259 in UTF-8. Not accepted: NaN, Infinity, lone surrogates (\\ud800), raw control characters.
Accepted: \\u0000 in a text, repeated keys (the last one counts), numbers of any size in fields that are not read, and
bytes that are not UTF-8 in fields that are not read. Cost: about 1.5 us a record; where many of one plain shape follow
each other, `data_prep.records.plain` does the same for less.
"""

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, ClassVar

import msgspec
import xxhash

from data_prep.records.reasons import Reason
from data_prep.records.turns import (
    Normal,
    Rejected,
    Role,
    conversation,
    is_blank,
    is_nothing,
    pairs,
    string,
    target,
    tool_list,
    type_name,
    wrong_type,
)
from data_prep.settings import COLUMNS, is_plain_key

_PAIR = bytes((Role.USER, Role.ASSISTANT))
_TRIPLE = bytes((Role.USER, Role.INPUT, Role.ASSISTANT))
_TITLED = bytes((Role.TITLE, Role.TEXT))
_TEXT = bytes((Role.TEXT,))
_SYSTEM = bytes((Role.SYSTEM,))
_TOOLS = bytes((Role.TOOLS,))

DOCUMENT = ("title", "content", "text")
SAME_AS_PAIR = (("prompt", "completion"), ("prompt", "response"), ("query", "response"), ("question", "answer"))
OTHER_TRAINING = {
    **dict.fromkeys(("chosen", "rejected", "rejected_response"), "answers to prefer to others"),
    **dict.fromkeys(("preferred_output", "non_preferred_output"), "answers to prefer to others"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "more than text"),
    **dict.fromkeys(("label", "kto_tag"), "an answer that may be a bad one"),
}
MAX_LEARNT = 64  # keys beyond the usual ones that a decoder knows; a record with another one is decoded twice


class Row(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """The fields of the usual shapes, untyped: what is wrong with one is only looked at where the shape needs it."""

    is_wide: ClassVar[bool] = False  # whether it may have others
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

    def more(self) -> dict[str, Any]:
        """The values of the other `COLUMNS` and of `OTHER_TRAINING`, without nulls; a dict of the caller's own."""
        return {}

    def unread(self) -> list[str]:
        """Keys that no shape reads."""
        return []


class _Wide(Row, gc=False):
    """A row that was made of a dict."""

    is_wide: ClassVar[bool] = True
    found: dict[str, Any] = {}
    ignored: list[str] = []

    def more(self) -> dict[str, Any]:
        return self.found

    def unread(self) -> list[str]:
        return self.ignored


_NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
encode_texts = msgspec.msgpack.Encoder().encode


class Decoder:
    """Bytes or a dict -> Row. The keys of a corpus are few, so unusual ones are learnt: then they cost one decoding.

    :param columns: field -> the key under which the corpus has it.
    """

    def __init__(self, columns: Mapping[str, str] | None = None):
        columns = columns or {}
        self.renames = bool(columns)
        self.field_of = {name: name for name in (*COLUMNS, *OTHER_TRAINING) if name not in columns}
        self.field_of |= {key: name for name, key in columns.items()}
        self.learnt: list[str] = []
        self._learn([])

    def decode(self, data: bytes | msgspec.Raw) -> Row | list:
        """The record in ``data``: a Row, or the list of turns it is.

        :raises Rejected: malformed_json, invalid_utf8, or unknown_shape for a number, a string, true, null.
        """
        try:
            return self._decode_row(data)
        except msgspec.ValidationError:
            return self._decode_other(data)
        except _NO_JSON as error:
            raise _no_json(error) from None

    def from_mapping(self, record: Any) -> Row | list:
        """The same for what a user's reader yields."""
        if isinstance(record, dict):
            return self._row(record)
        return record if isinstance(record, list) else _unknown(record)

    def _decode_other(self, data: bytes | msgspec.Raw) -> Row | list:
        """JSON that is no object, or an object with a key that is not known yet or a number beyond 64 bits."""
        try:
            fields = _decode_fields(data)
        except msgspec.ValidationError:
            value = _decode_any(data)
            return value if isinstance(value, list) else _unknown(value)
        except _NO_JSON as error:
            raise _no_json(error) from None
        new = [key for key in fields if self.field_of.get(key) not in Row.__struct_fields__ and key not in self.learnt]
        if new and len(self.learnt) + len(new) <= MAX_LEARNT and all(map(is_plain_key, new)):
            self._learn(new)
            return self.decode(data)
        return self._row({key: value for key, value in fields.items() if bytes(value) != b"null"})

    def _row(self, record: Mapping[Any, Any]) -> Row:
        row = _Wide()
        for key, value in record.items():
            field = self.field_of.get(key)
            if value is None:
                continue
            if field is None:
                row.ignored.append(str(key))
                continue
            decoded = _decode_any(value) if type(value) is msgspec.Raw else value
            if field in Row.__struct_fields__:
                setattr(row, field, decoded)
            else:
                row.found[field] = decoded
        return row

    def _learn(self, keys: list[str]) -> None:
        """A struct that has these keys too; what nobody reads stays raw."""
        self.learnt += keys
        key_of = {field: key for key, field in self.field_of.items()}
        usual = [(name, Any, None) for name in Row.__struct_fields__]
        names = {f"more_{number}": key for number, key in enumerate(self.learnt)}
        read = [(name, self.field_of[key]) for name, key in names.items() if key in self.field_of]
        others = [(name, key) for name, key in names.items() if key not in self.field_of]

        def more(row: Row) -> dict[str, Any]:
            return {field: value for name, field in read if (value := getattr(row, name)) is not None}

        def unread(row: Row) -> list[str]:
            return [
                key for name, key in others if (value := getattr(row, name)) is not None and bytes(value) != b"null"
            ]

        learnt = [(name, Any if key in self.field_of else msgspec.Raw, None) for name, key in names.items()]
        rename = {name: key_of.get(name, f"(nothing is {name})") for name in Row.__struct_fields__} | names
        namespace = {"more": more, "unread": unread, "is_wide": True} if self.learnt else {}
        struct = msgspec.defstruct(
            "Learnt", [*usual, *learnt], bases=(Row,), namespace=namespace, rename=rename, gc=False
        )
        self._decode_row: Callable[[Any], Any] = msgspec.json.Decoder(struct).decode


class _Rest:
    """The fields of a row that a shape does not read."""

    def __init__(self, *read: str):
        self.names = tuple(name for name in Row.__struct_fields__ if name not in read)
        self.values = attrgetter(*self.names)
        self.none = (None,) * len(self.names)

    def note(self, row: Row, unread: list[str]) -> None:
        values = self.values(row)
        if values != self.none:
            unread += [name for name, value in zip(self.names, values, strict=True) if value is not None]


_NO_CHAT = ("conversations", "messages")  # absent wherever another shape is looked for
_REST_OF_PAIR = _Rest("input", "target", "system", "instruction", *_NO_CHAT)
_REST_OF_INSTRUCTION = _Rest("instruction", "input", "output", "system", *_NO_CHAT)
_REST_OF_MESSAGES = _Rest("messages", "system", "conversations")
_REST_OF_CONVERSATIONS = _Rest("conversations", "system")
_REST_OF_TITLED = _Rest("title", "content")
_REST_OF_TEXT = _Rest("text")


def normalise(row: Row | list, kind: str, unread: list[str]) -> Normal:
    """``kind`` is ``instruction`` or ``pretraining``; keys that nothing is made of are added to ``unread``.

    :raises Rejected: any reason of reading but those of JSON itself.
    """
    if isinstance(row, list):
        if kind == "pretraining":
            raise Rejected(Reason.UNKNOWN_SHAPE, "a list of turns in the pretraining directory")
        return pairs(row, unread)
    read = _document if kind == "pretraining" else _of_any_shape
    if not row.is_wide:
        return read(row, {}, unread)
    more = row.more()
    normal = read(row, more, unread)
    unread += more
    unread += row.unread()
    return normal


def content_hash(roles: bytes, texts: list[str]) -> bytes:
    """16 bytes, equal for equal normal forms: the key of duplicates and of the validation split.

    :raises Rejected: invalid_utf8, for a lone surrogate that a user's reader let through.
    """
    try:
        return xxhash.xxh3_128_digest(roles + encode_texts(texts))
    except UnicodeEncodeError:
        raise Rejected(Reason.INVALID_UTF8, "a lone surrogate in a text") from None


def _decode_any(data: bytes | msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.ValidationError:
        return 0  # a number beyond 64 bits: of the wrong type wherever it matters
    except _NO_JSON as error:
        raise _no_json(error) from None


def _no_json(error: Exception) -> Rejected:
    if isinstance(error, UnicodeDecodeError):
        return Rejected(Reason.INVALID_UTF8, f"byte {error.object[error.start]:#04x} in a text")
    return Rejected(Reason.MALFORMED_JSON, "nested too deeply" if isinstance(error, RecursionError) else str(error))


def _unknown(value: Any) -> Row | list:
    raise Rejected(Reason.UNKNOWN_SHAPE, f"a record is an object or a list of turns, not {type_name(value)}")


def _of_any_shape(row: Row, more: dict[str, Any], unread: list[str]) -> Normal:
    """A record of the instruction directory."""
    if more:
        _use_same_words(row, more)
        _refuse_other_training(more)
    if row.conversations is not None:
        roles, texts = conversation(row.conversations, "conversations", unread)
        _REST_OF_CONVERSATIONS.note(row, unread)
    elif row.messages is not None:
        roles, texts = conversation(row.messages, "messages", unread)
        _REST_OF_MESSAGES.note(row, unread)
    elif row.instruction is not None:
        roles, texts = _instruction(row, unread)
    elif row.target is not None or row.input is not None:
        roles, texts = _pair(row, unread)
    else:
        return _document(row, more, unread)
    if more:
        roles, texts = _with_history(
            more, roles, texts, is_chat=row.conversations is not None or row.messages is not None
        )
    if row.system is not None and not is_nothing(row.system):
        roles, texts = _SYSTEM + roles, [string(row.system, "system"), *texts]
    if more and (tools := _tools(more)):
        return _TOOLS + roles, [tools, *texts]
    return roles, texts


def _document(row: Row, more: dict[str, Any], unread: list[str]) -> Normal:
    if row.content is not None:
        content = target(row.content, "content")
        _REST_OF_TITLED.note(row, unread)
        if row.title is None or row.title == "":
            return _TEXT, [content]
        return _TITLED, [string(row.title, "title"), content]
    if row.text is not None:
        _REST_OF_TEXT.note(row, unread)
        return _TEXT, [target(row.text, "text")]
    if row.title is not None:
        raise Rejected(Reason.MISSING_FIELD, '"content" is absent beside "title"')
    found = [name for name in Row.__struct_fields__ if getattr(row, name) is not None] + list(more)
    raise Rejected(Reason.UNKNOWN_SHAPE, f"has only {', '.join(found)}" if found else "no known field")


def _pair(row: Row, unread: list[str]) -> Normal:
    if row.text is not None or row.content is not None or row.output is not None or row.title is not None:
        _REST_OF_PAIR.note(row, unread)
    return _PAIR, [string(row.input, "input"), target(row.target, "target")]


def _instruction(row: Row, unread: list[str]) -> Normal:
    if row.text is not None or row.content is not None or row.target is not None or row.title is not None:
        _REST_OF_INSTRUCTION.note(row, unread)
    instruction = row.instruction
    output = target(row.output, "output")
    if type(instruction) is list:
        instruction = _alternative(instruction, output)
    elif type(instruction) is not str:
        wrong_type(instruction, "instruction")
    if row.input is None or row.input == "":
        return _PAIR, [instruction, output]
    return _TRIPLE, [instruction, string(row.input, "input"), output]


def _alternative(instructions: list, output: str) -> str:
    texts = [string(text, "instruction") for text in instructions]
    if not texts:
        raise Rejected(Reason.MISSING_FIELD, '"instruction" is an empty list')
    return texts[xxhash.xxh3_64_intdigest(encode_texts([*texts, output])) % len(texts)]


def _use_same_words(row: Row, more: dict[str, Any]) -> None:
    """Fields of other tools under the names they have here; they are taken out of ``more``."""
    if row.instruction is not None:
        if row.output is None and "response" in more:
            row.output = more.pop("response")
            row.input = more.pop("context", None) if row.input is None else row.input
        return
    if any(getattr(row, name) is not None for name in ("conversations", "messages", "input", "target", *DOCUMENT)):
        return
    for asked, answer in SAME_AS_PAIR:
        if asked in more and answer in more:
            question, reply = more.pop(asked), more.pop(answer)
            if type(question) is list and type(reply) is list:
                row.messages = [*map(_as_context, question), *reply]
            else:
                row.input, row.target = question, reply
            return


def _as_context(turn: Any) -> Any:
    """A turn of a prompt: whoever speaks, it is no target."""
    return {**turn, "train": False} if type(turn) is dict else turn


def _refuse_other_training(more: dict[str, Any]) -> None:
    for name, meaning in OTHER_TRAINING.items():
        value = more.get(name)
        if type(value) is bool if name in {"label", "kto_tag"} else type(value) in {str, list, dict} and value:
            raise Rejected(Reason.UNSUPPORTED_FIELD, f'"{name}" says {meaning}: training of another kind')


def _with_history(more: dict[str, Any], roles: bytes, texts: list[str], is_chat: bool) -> Normal:
    """The turns of "history" in front, which a chat has itself."""
    if is_nothing(more.get("history")):
        more.pop("history", None)
    if is_chat or "history" not in more:
        return roles, texts
    history = more.pop("history")
    if type(history) is not list:
        wrong_type(history, "history", "a list")
    for pair in history:
        if type(pair) is not list or len(pair) != 2:
            wrong_type(pair, "history[]", "a list of two strings, question and answer")
    said = [string(text, "history[][]") for pair in history for text in pair]
    answers = (Role.ANSWERED if is_blank(answer) else Role.ASSISTANT for answer in said[1::2])
    return bytes(role for answer in answers for role in (Role.USER, answer)) + roles, said + texts


def _tools(more: dict[str, Any]) -> str:
    for name in ("tools", "functions"):
        if tools := tool_list(more.pop(name, None), name):
            return tools
    return ""
