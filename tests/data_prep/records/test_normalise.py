"""Every documented shape and its normal form; every reason; what counts as JSON."""

import json

import pytest

from data_prep.records.normalise import (
    ASSISTANT,
    INPUT,
    SYSTEM,
    TEXT,
    TITLE,
    USER,
    Rejected,
    content_hash,
    decode,
    from_mapping,
    normalise,
)
from data_prep.records.reasons import Reason

TURNS = [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "h"}, {"role": "assistant", "content": "g"}]


def both_ways(record, kind: str):
    """The normal form of a record, read from its bytes and as a user's reader would yield it."""
    results = []
    for parse, value in ((decode, json.dumps(record).encode()), (from_mapping, record)):
        try:
            roles, texts = normalise(parse(value), kind)
            results.append((list(roles), texts))
        except Rejected as rejected:
            results.append(rejected.reason)
    assert results[0] == results[1]
    return results[0]


@pytest.mark.parametrize(
    ("record", "roles", "texts"),
    [
        ({"input": "a", "target": "b"}, [USER, ASSISTANT], ["a", "b"]),
        ({"input": "", "target": "b", "extra": {"x": [1]}}, [USER, ASSISTANT], ["", "b"]),
        ({"instruction": "i", "input": "a", "output": "o"}, [USER, INPUT, ASSISTANT], ["i", "a", "o"]),
        ({"instruction": "i", "input": "", "output": "o"}, [USER, ASSISTANT], ["i", "o"]),
        ({"instruction": "i", "input": None, "output": "o"}, [USER, ASSISTANT], ["i", "o"]),
        ({"instruction": "i", "output": "o"}, [USER, ASSISTANT], ["i", "o"]),
        ({"instruction": ["i"], "output": "o"}, [USER, ASSISTANT], ["i", "o"]),
        ({"system": "s", "instruction": "i", "output": "o"}, [SYSTEM, USER, ASSISTANT], ["s", "i", "o"]),
        ({"system": "", "input": "a", "target": "b"}, [USER, ASSISTANT], ["a", "b"]),
        (
            [{"input": "a", "target": "b"}, {"input": "c", "target": "d"}],
            [USER, ASSISTANT, USER, ASSISTANT],
            ["a", "b", "c", "d"],
        ),
        ({"conversations": TURNS}, [SYSTEM, USER, ASSISTANT], ["s", "h", "g"]),
        ({"messages": MESSAGES}, [SYSTEM, USER, ASSISTANT], ["s", "h", "g"]),
        ({"conversations": MESSAGES}, [SYSTEM, USER, ASSISTANT], ["s", "h", "g"]),
        ({"system": "S", "messages": MESSAGES[1:]}, [SYSTEM, USER, ASSISTANT], ["S", "h", "g"]),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}
                ]
            },
            [ASSISTANT],
            ["xy"],
        ),
        ({"title": "t", "content": "c"}, [TITLE, TEXT], ["t", "c"]),
        ({"text": "x"}, [TEXT], ["x"]),
        ({"input": "\u0000", "target": "竹\U0001f43c"}, [USER, ASSISTANT], ["\u0000", "竹\U0001f43c"]),
        ({"input": "a", "target": "b", "title": 10**40, "content": [10**40]}, [USER, ASSISTANT], ["a", "b"]),
    ],
)
def test_shapes_of_the_instruction_directory(record, roles, texts):
    assert both_ways(record, "instruction") == (roles, texts)


@pytest.mark.parametrize(
    ("record", "roles", "texts"),
    [
        ({"title": "t", "content": "c"}, [TITLE, TEXT], ["t", "c"]),
        ({"title": "", "content": "c"}, [TEXT], ["c"]),
        ({"content": "c"}, [TEXT], ["c"]),
        ({"text": "x", "input": 5, "url": "u"}, [TEXT], ["x"]),
    ],
)
def test_shapes_of_the_pretraining_directory(record, roles, texts):
    assert both_ways(record, "pretraining") == (roles, texts)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, Reason.UNKNOWN_SHAPE),
        ({"question": "q"}, Reason.UNKNOWN_SHAPE),
        (5, Reason.UNKNOWN_SHAPE),
        ("text", Reason.UNKNOWN_SHAPE),
        (None, Reason.UNKNOWN_SHAPE),
        ({"messages": [{"role": "tool", "content": "x"}]}, Reason.UNKNOWN_SHAPE),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, Reason.UNKNOWN_SHAPE),
        ({"input": "a"}, Reason.MISSING_FIELD),
        ({"target": "a"}, Reason.MISSING_FIELD),
        ({"input": None, "target": "a"}, Reason.MISSING_FIELD),
        ({"instruction": "a"}, Reason.MISSING_FIELD),
        ({"instruction": [], "output": "o"}, Reason.MISSING_FIELD),
        ({"title": "t"}, Reason.MISSING_FIELD),
        ({"conversations": [{"from": "gpt"}]}, Reason.MISSING_FIELD),
        ({"conversations": [{"value": "x"}]}, Reason.MISSING_FIELD),
        ([{"input": "a"}], Reason.MISSING_FIELD),
        ({"input": 5, "target": "a"}, Reason.WRONG_TYPE),
        ({"input": 10**40, "target": "a"}, Reason.WRONG_TYPE),
        ({"input": "a", "target": ["b"]}, Reason.WRONG_TYPE),
        ({"instruction": ["a", 5], "output": "o"}, Reason.WRONG_TYPE),
        ({"instruction": {"a": 1}, "output": "o"}, Reason.WRONG_TYPE),
        ({"system": 5, "input": "a", "target": "b"}, Reason.WRONG_TYPE),
        ({"conversations": "hello"}, Reason.WRONG_TYPE),
        ({"conversations": ["hello"]}, Reason.WRONG_TYPE),
        ([5], Reason.WRONG_TYPE),
        ({"text": True}, Reason.WRONG_TYPE),
        ({"input": "a", "target": ""}, Reason.EMPTY_TARGET),
        ({"input": "a", "target": " \n\t"}, Reason.EMPTY_TARGET),
        ({"conversations": []}, Reason.EMPTY_TARGET),
        ({"conversations": TURNS[:2]}, Reason.EMPTY_TARGET),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": ""}]}, Reason.EMPTY_TARGET),
        ([], Reason.EMPTY_TARGET),
        ([{"input": "a", "target": ""}], Reason.EMPTY_TARGET),
        ({"text": ""}, Reason.EMPTY_TARGET),
    ],
)
def test_reasons_of_the_instruction_directory(record, reason):
    assert both_ways(record, "instruction") == reason


@pytest.mark.parametrize(
    "record", [{"input": "a", "target": "b"}, {"messages": MESSAGES}, [{"input": "a", "target": "b"}]]
)
def test_instruction_records_do_not_belong_into_the_pretraining_directory(record):
    assert both_ways(record, "pretraining") == Reason.UNKNOWN_SHAPE


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"input": "a", "target": NaN}', Reason.MALFORMED_JSON),
        (b'{"input": "a", "target": "b", "extra": Infinity}', Reason.MALFORMED_JSON),
        (b'{"input": "a", "target": "\\ud800"}', Reason.MALFORMED_JSON),
        (b'{"input": "a", "target": "x\ny"}', Reason.MALFORMED_JSON),
        (b'{"input": "a", "target": "x\x00y"}', Reason.MALFORMED_JSON),
        (b'{"input": "a", "target": "b"} trailing', Reason.MALFORMED_JSON),
        (b'{"input": "a", "target": "b",}', Reason.MALFORMED_JSON),
        (b'{"extra": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", Reason.MALFORMED_JSON),
        (b'{"input": 1e999x, "target": "b"}', Reason.MALFORMED_JSON),  # two faults, one behind the other
        (b'{"input": 1e999, "target": "b", "extra": ' + b"[" * 100_000, Reason.MALFORMED_JSON),
        (b'{"input": "a", "target": "\xff"}', Reason.INVALID_UTF8),
        (b'[{"input": "a", "target": "\xff"}]', Reason.INVALID_UTF8),
        (b'{"input": "a", "target": "b", "extra": "\xff"}', None),
        (b'{"input": "x", "target": "y", "input": "a", "target": "b"}', None),
        (b' {"input": "a", "target": "b"} \r', None),
    ],
)
def test_what_is_json(data, reason):
    try:
        assert normalise(decode(data), "instruction") == (bytes((USER, ASSISTANT)), ["a", "b"])
        assert reason is None
    except Rejected as rejected:
        assert rejected.reason == reason


def test_one_of_several_instructions_is_chosen_by_content():
    chosen = [
        normalise(from_mapping({"instruction": ["x", "y", "z"], "output": str(number)}), "instruction")[1][0]
        for number in range(300)
    ]
    again = normalise(from_mapping({"instruction": ["x", "y", "z"], "output": "0"}), "instruction")[1][0]
    assert chosen[0] == again
    assert all(70 < chosen.count(text) < 130 for text in "xyz")


def test_the_content_hash_tells_texts_and_roles_apart():
    forms = [(b"\1\3", ["ab", "c"]), (b"\1\3", ["a", "bc"]), (b"\4\5", ["a", "bc"]), (b"\1\3", ["a\0", "bc"])]
    assert len({content_hash(*form) for form in forms}) == 4
    assert all(len(content_hash(*form)) == 16 for form in forms)
    with pytest.raises(Rejected, match="invalid_utf8"):
        content_hash(b"\5", ["\ud800"])


def test_every_reason_explains_itself():
    assert all(len(reason.explanation) > 10 for reason in Reason)
