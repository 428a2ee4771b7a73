"""Looking at prepared data: inspect, why and verify on a corpus of a few records."""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_prep.errors import PandaError
from data_prep.inspection.inspect import (
    histogram,
    inspect_plan,
    inspection_html,
    inspection_markdown,
    print_inspection,
)
from data_prep.inspection.record_story import StepOrder, stories_at, stories_with, story_text
from data_prep.inspection.render import Shown, Token, abridged, as_html, as_markdown, as_tokens
from data_prep.pipeline import prepare
from data_prep.plan.order import rows_of_step
from data_prep.plan.reader import open_plan
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.store import verify_cache

PACK = PackSettings(max_seq_length=32)
LINES = [
    {"input": "one", "target": "eins 好"},
    {"input": "two", "target": "zwei"},
    {"input": "no target"},
    {"input": "one", "target": "eins 好"},
    {"input": "long", "target": "x" * 40},
    *({"input": f"q{i}", "target": f"a{i}"} for i in range(12)),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, bytes_dir):
    root = tmp_path_factory.mktemp("look")
    (root / "instruction").mkdir()
    (root / "instruction" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (root / "instruction" / "b.json").write_text('[\n {"input": "in an array",\n  "target": "of several lines"}\n]')
    (root / "pretraining").mkdir()
    (root / "pretraining" / "c.jsonl").write_text(json.dumps({"title": "T", "content": "a document 好 " * 10}))
    corpus = CorpusSettings(
        instruction_tuning_data_dir=str(root / "instruction"), pretraining_data_dir=str(root / "pretraining"),
        validation_fraction=0.2,
    )  # fmt: skip
    return root, prepare(corpus, TokenizeSettings(), PACK, bytes_dir, root / "cache")


def rendered(*objects):
    console = Console(file=StringIO(), width=200, color_system=None)
    console.print(*objects)
    return console.file.getvalue()


def test_why_an_accepted_record(prepared, bytes_tokenizer):
    root, result = prepared
    (story,) = stories_at(
        result.path, f"{root}/instruction/a.jsonl:2", bytes_tokenizer, StepOrder(2, seed=42, epochs=3)
    )
    assert story.entry["verdict"] == "accepted"
    assert story.texts == [("user", "two"), ("assistant", "zwei")]
    assert "".join(token.text for token in story.shown.tokens if token.target) == "zwei</s>"
    assert (story.shown.num_tokens, story.shown.num_targets) == (8, 5)
    (placement,) = story.placements
    plan = open_plan(Path(result.path), story.entry["split"])
    assert (f"{root}/instruction/a.jsonl", 2) in plan.origins(placement.row)
    for epoch, step in placement.trained:
        assert placement.row in rows_of_step(plan.num_rows, 2, 42, epoch, step)
    text = rendered(story_text(story))
    assert "accepted" in text
    assert f"row {placement.row}: tokens 0 to 8" in text


def test_every_training_row_says_when_it_is_trained(prepared, bytes_tokenizer):
    _, result = prepared
    (story,) = stories_at(result.path, "pretraining/c.jsonl:1", bytes_tokenizer, StepOrder(3, seed=1, epochs=2))
    placements = sorted(story.placements, key=lambda placement: placement.start)
    assert len(placements) > 1  # cut over several rows, no token lost
    assert [p.start for p in placements] == [0, *np.cumsum([p.length for p in placements])[:-1].tolist()]
    if story.entry["split"] == "train":
        assert all(len(placement.trained) == 2 for placement in placements)


@pytest.mark.parametrize(
    ("line", "verdict", "said"),
    [
        (3, "rejected", ['{"input": "no target"}', "missing_field", "absent or null"]),
        (4, "dropped", ["duplicate", "the record that is kept", "a.jsonl:1", "eins 好"]),
        (5, "dropped", ["too_long", "longer than max_seq_length"]),
    ],
)
def test_why_not(prepared, bytes_tokenizer, line, verdict, said):
    _, result = prepared
    (story,) = stories_at(result.path, f"a.jsonl:{line}", bytes_tokenizer)
    assert story.entry["verdict"] == verdict
    assert story.placements == []
    text = rendered(story_text(story))
    assert all(words in text for words in said), text


def test_a_line_inside_a_record_finds_it(prepared, bytes_tokenizer):
    _, result = prepared
    for line in (2, 3):
        (story,) = stories_at(result.path, f"b.json:{line}", bytes_tokenizer)
        assert story.texts[0] == ("user", "in an array")


def test_why_by_text(prepared, bytes_tokenizer):
    _, result = prepared
    first, second = stories_with(result.path, "eins 好", bytes_tokenizer)
    assert (first.entry["verdict"], second.entry["reason"]) == ("accepted", "duplicate")
    assert [s.place.rpartition("/")[2] for s in stories_with(result.path, "several lines", bytes_tokenizer)] == [
        "b.json:2"
    ]
    with pytest.raises(PandaError, match="no valid record contains 'absent'"):
        stories_with(result.path, "absent", bytes_tokenizer)


@pytest.mark.parametrize(
    ("place", "message"),
    [("a.jsonl", "not FILE:LINE"), ("x.jsonl:1", "no file 'x.jsonl'"), ("b.json:1", "has records from line 2 on")],
)
def test_why_nothing(prepared, bytes_tokenizer, place, message):
    with pytest.raises(PandaError, match=message):
        stories_at(prepared[1].path, place, bytes_tokenizer)


def test_inspection(prepared, bytes_tokenizer):
    _, result = prepared
    inspection = inspect_plan(Path(result.path), bytes_tokenizer, num_examples=2)
    assert len(inspection.examples) == 3  # two of instruction, the only one of pretraining
    assert inspection.packing[0].rows == result.report["rows"]
    assert inspection.packing[0].utilisation == pytest.approx(result.report["utilisation"], abs=1e-6)
    assert sum(count for _, count in inspection.lengths) == result.report["accepted"]
    console = Console(file=StringIO(), width=200)
    print_inspection(inspection, console)
    page, markdown = inspection_html(inspection), inspection_markdown(inspection)
    for text in (console.file.getvalue(), page, markdown):
        assert "Packing" in text
        assert "c.jsonl:1 (pretraining" in text
    assert page.startswith("<!doctype html>")
    assert "⟦T\na document 好" in markdown
    same = inspect_plan(Path(result.path), bytes_tokenizer, num_examples=2)
    assert [shown.title for shown in same.examples] == [shown.title for shown in inspection.examples]


def test_histogram_literal():
    assert histogram(np.array([1, 2, 3, 4, 5, 16])) == [(1, 1), (2, 1), (4, 2), (8, 1), (16, 1)]
    assert histogram(np.array([5, 9])) == [(8, 1), (16, 1)]
    assert histogram(np.array([])) == []


def test_tokens_of_several_bytes_are_one_character(bytes_tokenizer):
    ids = bytes_tokenizer.core.encode("a好</s>").ids
    tokens = as_tokens(ids, [False, True, True, True, True], bytes_tokenizer)
    assert [(token.text, len(token.ids), token.target) for token in tokens] == [
        ("a", 1, False), ("好", 3, True), ("</s>", 1, True),
    ]  # fmt: skip


def test_html_is_escaped_and_markdown_fenced(bytes_tokenizer):
    shown = Shown("<t>", [Token("<b>&", (1,), False), Token("```", (2,), True)], 2, 1)
    assert "&lt;b&gt;&amp;" in as_html(shown)
    assert "<b>" not in as_html(shown)
    assert as_markdown(shown).endswith("````\n<b>&⟦```⟧\n````\n")


def test_a_long_example_is_abridged():
    tokens = [Token(str(i), (i,), True) for i in range(100)]
    short = abridged(tokens, 10)
    assert [token.text for token in short[:5]] == list("01234")
    assert short[5].text == " […90 tokens…] "
    assert short[-1].text == "99"


def test_verify_names_and_discards_a_flipped_byte(prepared, bytes_dir, tmp_path):
    root, result = prepared
    whole = verify_cache(root / "cache")
    assert whole.damaged == {}
    assert whole.directories == 3 + 3 + 1
    victim = next((root / "cache" / "tokens").rglob("tokens.arrow"))
    content = victim.read_bytes()
    victim.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
    assert verify_cache(root / "cache").damaged == {str(victim.parent): ["tokens.arrow"]}
    assert verify_cache(root / "cache", discard_damaged=True).discarded
    assert not victim.exists()
    corpus = CorpusSettings(
        instruction_tuning_data_dir=str(root / "instruction"), pretraining_data_dir=str(root / "pretraining"),
        validation_fraction=0.2,
    )  # fmt: skip
    again = prepare(corpus, TokenizeSettings(), PACK, bytes_dir, root / "cache")
    assert again.path == result.path
    assert victim.read_bytes() == content
    assert verify_cache(root / "cache").damaged == {}
