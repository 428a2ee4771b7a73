"""Records from elsewhere: neutral texts, how well they are guessed, and how they stand beside those of a corpus."""

import math
from dataclasses import replace

import numpy as np
import pytest

from data_prep.errors import PandaError
from training.comparison.heldout import guessed, neutral


def test_the_bundled_texts():
    texts = neutral(None)
    assert len(texts) == len(set(texts.hashes)) == 100
    assert {name: list(texts.names).count(name) for name in set(texts.names)} == {
        "neutral/other": 60,
        "neutral/cjk": 40,
    }


def test_texts_of_ones_own_in_any_shape_of_a_record(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "one"}\n\n{"instruction": "say", "output": "two"}\n', encoding="utf-8")
    texts = neutral(path)
    assert texts.places == [f"{path}:1", f"{path}:3"] and texts.texts.to_pylist() == [["one"], ["say", "two"]]
    path.write_text('{"text": "one"}\n{"words": "two"}\n', encoding="utf-8")
    with pytest.raises(PandaError, match=r"neutral_texts: .*mine\.jsonl:2: unknown_shape: no known field"):
        neutral(path)
    with pytest.raises(PandaError, match="No such file"):
        neutral(tmp_path / "absent.jsonl")


def test_a_guess_knows_only_how_often_characters_are():
    assert guessed(["aab", "b"]).tolist() == pytest.approx([3 * math.log(2), math.log(2)])


def test_records_from_elsewhere_stand_behind_and_are_no_prompts(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [f'{{"instruction": "say {i}", "output": "{i}"}}\n' for i in range(4)]
    path.write_text("".join(lines), encoding="utf-8")
    own = replace(neutral(path), sources=["instruction"] * 4)
    path.write_text("".join(lines[3:]) + '{"instruction": "sing", "output": "la"}\n', encoding="utf-8")
    both = own.with_others(neutral(path))
    assert (len(both), both.num_own, both.num_elsewhere) == (5, 4, 1)  # one of the two is here already
    assert both.prompts(10) == [0, 1, 2, 3] and both.texts_of_prompts(2) == [("say 0", "0"), ("say 1", "1")]
    elsewhere = both.elsewhere()
    assert both.slices().keys() == {"instruction/other"} and elsewhere.slices["neutral/other"].tolist() == [4]
    assert elsewhere.guesses[4] == pytest.approx(guessed(["singla"])[0]) and not np.any(elsewhere.guesses[:4])
