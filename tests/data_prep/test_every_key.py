"""Every key of every record is honoured or refused: nothing that a record says is passed over in silence."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.pipeline import prepare
from data_prep.plan.ledger import open_ledger
from data_prep.records.normalise import Decoder, content_hash, normalise
from data_prep.records.turns import Rejected
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokenizer import load_tokenizer
from data_prep.tokens.encoder import load_engine
from data_prep.tokens.examples import tokenize_columns
from data_prep.tokens.templates import load_template
from tests.data_prep.tokens.test_examples import columns
from tests.support.chat_templates import QWEN_2_5

TURNS = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    {"role": "tool", "content": "r"},
    {"role": "assistant", "content": "a"},
]
RECORDS = [
    {"input": "q", "target": "a"},
    {"instruction": "i", "input": "q", "output": "a", "history": [["h", "b"]]},
    {"prompt": "q", "completion": "a"},
    {"messages": TURNS},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    [{"input": "q", "target": "a"}, {"input": "r", "target": "b"}],
    {"title": "t", "content": "c"},
    {"text": "x"},
]
KNOWN = [
    *(
        "input",
        "target",
        "instruction",
        "output",
        "system",
        "title",
        "content",
        "text",
        "history",
        "tools",
        "functions",
    ),
    *("prompt", "completion", "response", "answer", "context", "messages", "role", "name", "tool_calls", "train"),
    *("weight", "loss", "reasoning_content", "function_call", "label", "chosen", "images", "from", "value", "id"),
]
VALUES = st.recursive(
    st.booleans() | st.integers(-2, 2) | st.floats(0, 1) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A tokenizer whose template has a place for tools, and thoughts in the answer."""
    tokenizer = load_tokenizer(QWEN_2_5.write(tmp_path_factory.mktemp("qwen")))
    return tokenizer, load_template("tokenizer", tokenizer), load_engine(tokenizer.core, "reference")


def seen(record, tools):
    """All that training and the report would show of a record."""
    unread: list[str] = []
    try:
        roles, texts = normalise(Decoder().decode(json.dumps(record).encode()), "instruction", unread)
        content_hash(roles, texts)
    except Rejected as rejected:
        return str(rejected)
    made = tokenize_columns(*columns([(list(roles), texts)]), *tools)
    return made.shard.ids.tolist(), made.shard.spans.tolist(), sorted(unread), list(made.runs.refused.values())


def places(record):
    """Every object of a record that has a place for one more key: itself and its turns."""
    yield from (place for place in (record if isinstance(record, list) else [record]))
    if isinstance(record, dict):
        for turn in record.get("messages", record.get("conversations", [])):
            yield turn
            yield from (call[name] for call in turn.get("tool_calls", []) for name in ("function",))


def says_nothing(place, key, value):
    """A key that states what holds without it, such as a usual weight; or of which the template makes what it likes."""
    if place.get("role") == "tool" and key == "name":
        return True
    if key in ("tools", "functions") and value in ("[]", "{}", "null"):
        return True
    if key in ("weight", "loss", "train"):
        return value in (0, 1) and bool(value) == (place.get("role", place.get("from")) in ("assistant", "gpt", None))
    return value in ("", [], {}) and place.get(key, "") in ("", [])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(RECORDS), st.integers(0, 9), st.sampled_from(KNOWN) | st.text(max_size=4), VALUES)
def test_a_key_more_is_always_seen(tools, record, which, key, value):
    changed = deepcopy(record)
    found = list(places(changed))
    place = found[which % len(found)]
    if place.get(key) == value or says_nothing(place, key, value):
        return
    place[key] = value
    assert seen(changed, tools) != seen(record, tools)


def prepared(tmp_path: Path, lines, template="chatml", tokenizer=None, **asked):
    """The report and the ledger of a corpus of these records."""
    source = tmp_path / "in"
    source.mkdir(exist_ok=True)
    (source / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = CorpusSettings.model_fields.keys() & asked.keys()
    corpus = CorpusSettings(
        instruction_tuning_data_dir=str(source), pretraining_data_dir=None, validation_fraction=0, prepare_workers=1,
        max_rejected_fraction=0.9, **{name: asked[name] for name in names},
    )  # fmt: skip
    how = TokenizeSettings(template=template, **{name: asked[name] for name in asked.keys() - names})
    made = prepare(corpus, how, PackSettings(max_seq_length=64), tokenizer, tmp_path / "cache")
    return made.report, open_ledger(Path(made.path)).table


def test_unread_fields_are_counted_and_refused_where_strict(tmp_path, bytes_dir):
    lines = [
        {"input": "q", "target": "a", "id": 1},
        {"input": "r", "target": "b", "id": None},
        {"messages": TURNS[::3]},
    ]
    lines[2]["messages"] = [{**turn, "stamp": 1} for turn in lines[2]["messages"]]
    report, _ = prepared(tmp_path, lines, tokenizer=bytes_dir)
    assert report["unread_fields"] == {"id": 1, "messages[].stamp": 1}
    strict, ledger = prepared(tmp_path, lines, tokenizer=bytes_dir, strict_fields=True)
    assert (strict["unread_fields"], strict["rejected"]) == ({}, {"unsupported_field": 2})
    assert ledger["reason"].to_pylist() == ["unsupported_field", None, "unsupported_field"]


def test_names_without_end_are_counted_together(tmp_path, bytes_dir):
    lines = [{"input": "q", "target": f"a{number}", f"key{number}": 1} for number in range(150)]
    report, _ = prepared(tmp_path, lines, tokenizer=bytes_dir)
    assert len(report["unread_fields"]) == 101
    assert report["unread_fields"]["(other names)"] == 50


def test_columns(tmp_path, bytes_dir):
    names = {"instruction": "q", "output": "instruction"}
    lines = [{"q": "1+1?", "instruction": "2", "output": "x"}]
    report, ledger = prepared(tmp_path, lines, tokenizer=bytes_dir, columns=names)
    plain, expected = prepared(tmp_path, [{"instruction": "1+1?", "output": "2"}], tokenizer=bytes_dir)
    assert report["unread_fields"] == {"output": 1}
    assert ledger["hash"].to_pylist() == expected["hash"].to_pylist()
    assert plain["unread_fields"] == {}


@pytest.mark.parametrize(
    ("names", "message"),
    [({"instructions": "q"}, "no field of a record; did you mean instruction"), ({"input": "q", "target": "q"}, "two")],
)
def test_wrong_columns_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        CorpusSettings(columns=names)


def test_what_a_template_refuses_is_set_aside_and_named(tmp_path):
    """A conversation that begins with the assistant, where the template does not allow it; the others are trained."""
    from tests.support.chat_templates import GEMMA

    directory = GEMMA.write(tmp_path / "gemma")
    lines = [{"input": "q", "target": "a"}, {"messages": [TURNS[3], TURNS[0], TURNS[3]]}, {"messages": TURNS}]
    report, ledger = prepared(tmp_path, lines, template="tokenizer", tokenizer=directory)
    assert ledger["reason"].to_pylist() == [None, "template_refused", "template_refused"]
    assert (report["accepted"], report["rejected"]) == (1, {"template_refused": 2})
    assert report["target_tokens"] == 2


def test_an_empty_answer_is_context(tmp_path, bytes_dir):
    empty = [TURNS[0], {"role": "assistant", "content": ""}, {"role": "user", "content": "r"}, TURNS[3]]
    report, _ = prepared(tmp_path, [{"messages": empty}], tokenizer=bytes_dir)
    assert (report["accepted"], report["target_tokens"]) == (1, 2)  # the last answer and its end


def test_train_on_and_weights_change_masks_and_no_id(tmp_path, bytes_dir):
    chat = [TURNS[0], {"role": "assistant", "content": "first"}, {"role": "user", "content": "r"}, TURNS[3]]
    weighted = {"messages": [chat[0], {**chat[1], "weight": 0}, *chat[2:]]}
    asked = [({"messages": chat}, {}), ({"messages": chat}, {"train_on": "last"}), (weighted, {})]
    reports = [prepared(tmp_path, [line], tokenizer=bytes_dir, **settings)[0] for line, settings in asked]
    assert [report["target_tokens"] for report in reports] == [8, 2, 2]
    assert len({report["tokens"] for report in reports}) == 1
