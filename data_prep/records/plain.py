"""Records of one plain shape, many at a time: nearly all records of nearly all corpora, at a third of the cost.

In: the bytes of some records as they follow each other. Out: their roles, texts and content hashes, if all of them are
of one shape below and nothing is to be said about any: exactly what `data_prep.records.normalise` makes of them one by
one, which is asked where there is no answer from here. A reason to reject, an unknown key, a null, a chat, a weight:
all that is looked at there alone.

    {"text": "a"}                                               TEXT
    {"title": "a", "content": "b"}, {"content": "b"}            TITLE TEXT (TEXT where the title is empty)
    {"instruction": "a", "input": "b", "output": "c"}           USER INPUT ASSISTANT (USER ASSISTANT without the input)
    {"input": "a", "target": "b"} and the other names of pairs  USER ASSISTANT

Cost: 1.5 us a record of 200 bytes; a failed attempt 0.3 us a record.
"""

from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
import xxhash

from data_prep.records.normalise import SAME_AS_PAIR, encode_texts
from data_prep.records.turns import Role

CHUNK = 128  # records: few enough that an unusual one among them costs little, many enough to be worth a call

_TEXT, _TITLED = bytes((Role.TEXT,)), bytes((Role.TITLE, Role.TEXT))
_PAIR, _TRIPLE = bytes((Role.USER, Role.ASSISTANT)), bytes((Role.USER, Role.INPUT, Role.ASSISTANT))
_NO_PLAIN_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_decode_elements = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_keys = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Plain(NamedTuple):
    """As columns: roles and content hash of each record, and the texts of all one after another."""

    roles: list[bytes]
    texts: list[str]
    hashes: list[bytes]


class _Shape:
    """The fields of a shape, the last of which is what is learnt; ``optional`` may be absent or empty, and is then no
    text of the record."""

    def __init__(self, fields: tuple[str, ...], roles: bytes, optional: str = ""):
        self.roles, self.short_roles = (
            roles,
            bytes(role for name, role in zip(fields, roles, strict=True) if name != optional),
        )
        self.optional = fields.index(optional) if optional else -1
        own = [f"text_{number}" for number in range(len(fields))]
        typed: list[Any] = [(name, str) for name, field in zip(own, fields, strict=True) if field != optional]
        typed += [(own[self.optional], str, "")] if optional else []
        rename = dict(zip(own, fields, strict=True))
        struct = msgspec.defstruct("Plain", typed, rename=rename, forbid_unknown_fields=True, gc=False)
        self.decode = msgspec.json.Decoder(list[struct]).decode  # type: ignore[valid-type]  # made above
        self.texts_of: Any = attrgetter(*own) if len(own) > 1 else lambda record: (record.text_0,)

    def read(self, data: bytes) -> Plain | None:
        """All records of an array, if they are of this shape and have something to learn."""
        try:
            records = self.decode(data)
        except _NO_PLAIN_JSON:
            return None
        texts = list(map(self.texts_of, records))
        learnt = [each[-1] for each in texts]
        if not all(learnt) or any(map(str.isspace, learnt)):
            return None
        roles = [self.roles] * len(texts)
        if self.optional >= 0:
            at = self.optional
            for number, each in enumerate(texts):
                if not each[at]:
                    roles[number], texts[number] = self.short_roles, each[:at] + each[at + 1 :]
        said = [own + encode_texts(each) for own, each in zip(roles, texts, strict=True)]
        return Plain(roles, list(chain.from_iterable(texts)), list(map(xxhash.xxh3_128_digest, said)))


def _shapes() -> dict[str, dict[frozenset[str], _Shape]]:
    """Kind of directory -> the keys of a record -> its shape."""
    text, titled = _Shape(("text",), _TEXT), _Shape(("title", "content"), _TITLED, "title")
    documents = dict.fromkeys([frozenset({"title", "content"}), frozenset({"content"})], titled)
    documents[frozenset({"text"})] = text
    instructions = dict(documents)
    for fields in (("instruction", "input", "output"), ("instruction", "context", "response")):
        triple = _Shape(fields, _TRIPLE, fields[1])
        instructions |= {frozenset(fields): triple, frozenset(fields[::2]): triple}
    instructions |= {frozenset(fields): _Shape(fields, _PAIR) for fields in (("input", "target"), *SAME_AS_PAIR)}
    return {"instruction": instructions, "pretraining": documents}


_SHAPES = _shapes()


def read_plain(records: list[bytes] | list[msgspec.Raw], kind: str) -> Plain | None:
    """All of some records, or None where they are to be read one by one.

    :param kind: of the directory, ``instruction`` or ``pretraining``.
    """
    try:
        shape = _SHAPES[kind].get(frozenset(_decode_keys(records[0])))
    except _NO_PLAIN_JSON:
        return None
    if shape is None:
        return None
    data = b"".join((b"[", b",".join(records), b"]"))
    return shape.read(data) if _are_values(records, data) else None


def _are_values(records: list[bytes] | list[msgspec.Raw], data: bytes) -> bool:
    """Whether each record alone is a value of JSON: joined, broken ones may make up others (``[1`` and ``2]``)."""
    if isinstance(records[0], msgspec.Raw):
        return True
    try:
        return list(map(len, _decode_elements(data))) == list(map(len, records))
    except _NO_PLAIN_JSON:
        return False
