"""Records read many at a time are what they are one by one, or they are not read so at all."""

import json

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_prep.records import build_unit
from data_prep.records.normalise import Decoder, content_hash, normalise
from data_prep.records.plain import CHUNK, read_plain
from data_prep.records.reasons import Reason
from data_prep.records.source import Block

PLAIN = [
    ({"text": "a"}, "pretraining"),
    ({"title": "甲", "content": "乙"}, "pretraining"),
    ({"content": "b"}, "instruction"),
    ({"instruction": "a", "input": "", "output": "c"}, "instruction"),
    ({"instruction": "a", "input": "b", "output": "c"}, "instruction"),
    ({"instruction": "a", "output": "c"}, "instruction"),
    ({"instruction": "a", "context": "b", "response": "c"}, "instruction"),
    ({"instruction": "a", "response": "c"}, "instruction"),
    ({"input": "a", "target": "b"}, "instruction"),
    ({"prompt": "a", "completion": "b"}, "instruction"),
    ({"query": "a", "response": "b"}, "instruction"),
    ({"question": "a", "answer": "b"}, "instruction"),
]
NOT_PLAIN = [
    {"text": " "}, {"text": 1}, {"text": None}, {"text": "a", "id": 1}, {"instruction": ["a"], "output": "b"},
    {"instruction": "a", "output": "b", "input": None}, {"messages": []}, {"chosen": "a", "text": "b"},
]  # fmt: skip
FIELDS = ("text", "title", "content", "instruction", "input", "output", "target", "prompt", "completion", "weight")
VALUES = st.one_of(st.sampled_from(["", " ", "a", "\u3000", "a\u0000", None, 0, [], {}]), st.text(max_size=40))


def one_by_one(lines: list[bytes], kind: str) -> tuple[list, list, list]:
    found: tuple[list, list, list] = [], [], []
    for line in lines:
        unread: list[str] = []
        roles, texts = normalise(Decoder().decode(line), kind, unread)
        assert not unread
        found[0].append(roles)
        found[1].extend(texts)
        found[2].append(content_hash(roles, texts))
    return found


@pytest.mark.parametrize(("record", "kind"), PLAIN, ids=str)
def test_plain_shapes_are_read_at_once(record, kind):
    lines = [json.dumps({**record, list(record)[-1]: text}).encode() for text in ("x", "y " * 300, "好", "\\")]
    assert read_plain(lines, kind) == one_by_one(lines, kind)
    raw = msgspec.json.decode(b"[" + b" , ".join(lines) + b"]", type=list[msgspec.Raw])
    assert read_plain(raw, kind) == read_plain(lines, kind)


@pytest.mark.parametrize("record", NOT_PLAIN, ids=str)
def test_others_are_left_to_be_read_one_by_one(record):
    plain = b'{"text": "a"}'
    assert read_plain([plain, json.dumps(record).encode()], "instruction") is None
    assert read_plain([json.dumps(record).encode(), plain], "instruction") is None


def test_broken_lines_that_join_to_values_stay_broken():
    lines = [b'{"text": "a"},{"text": "b"}', b'{"text": "c"', b'"text": "d"}']
    assert read_plain(lines, "pretraining") is None
    assert read_plain([b'{"text": "a"', b'"text": "d"}'], "pretraining") is None
    assert read_plain([b'{"text": "a"}', b"\xff"], "pretraining") is None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3), min_size=1, max_size=3),
    st.sampled_from(["instruction", "pretraining"]),
)
@example([{"instruction": "a", "input": "b", "output": "c"}, {"instruction": "a", "output": "c"}], "instruction")
def test_what_is_read_at_once_is_what_is_read_one_by_one(records, kind):
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in records]
    if (plain := read_plain(lines, kind)) is not None:
        assert plain == one_by_one(lines, kind)


def test_an_unusual_record_changes_nothing_for_those_beside_it(monkeypatch):
    """Verdicts, order and counts of a block are the same where nothing is read at once."""
    records: list[dict] = [{"instruction": f"q{number}", "output": f"a{number}"} for number in range(4 * CHUNK)]
    records[5] |= {"id": 1}
    records[CHUNK + 7]["output"] = ""
    records[3 * CHUNK] = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    lines = [json.dumps(record).encode() for record in records]
    zeros = np.zeros(len(lines), np.int64)
    block = Block(lines, zeros, zeros, zeros, {2 * CHUNK + 1: Reason.OVERSIZED_RECORD})
    fast = build_unit._validate(block, Decoder(), "instruction", strict_fields=False)
    monkeypatch.setattr(build_unit, "read_plain", lambda records, kind: None)
    slow = build_unit._validate(block, Decoder(), "instruction", strict_fields=False)
    assert np.array_equal(fast.reasons, slow.reasons)
    assert np.flatnonzero(fast.reasons >= 0).tolist() == [CHUNK + 7, 2 * CHUNK + 1]
    assert (fast.roles, fast.texts, fast.hashes) == (slow.roles, slow.texts, slow.hashes)
    assert (fast.unread, fast.details) == (slow.unread, slow.details)
    assert fast.unread == {"id": 1}
