"""What moved between two corpora: seven planted faults are named with lines, more of the same is no change."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from data_prep.errors import PandaError
from data_prep.inspection import drift, profile
from data_prep.pipeline import prepare
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings

WORDS = ["river", "stone", "bread", "garden", "winter", "letter", "morning", "paper", "window", "music", "forest"]
SIGNS = "山水天地风云日月春夏秋冬花草树木鸟鱼虫人家门路桥城"


def english(draw: random.Random) -> dict[str, str]:
    words = " ".join(draw.choices(WORDS, k=draw.randint(8, 40)))
    return {"input": f"What is {draw.choice(WORDS)} {draw.random():.6f}?", "target": f"It is the {words}."}


def chinese(draw: random.Random) -> dict[str, str]:
    signs = "".join(draw.choices(SIGNS, k=draw.randint(8, 40)))
    return {"input": f"请说明{draw.choice(SIGNS)}{draw.random():.6f}", "target": f"这是{signs}。"}


DRAW = random.Random(0)
OLD = {"en": [english(DRAW) for _ in range(500)], "zh": [chinese(DRAW) for _ in range(200)]}
DOCUMENTS = [{"text": f"{' '.join(DRAW.choices(WORDS, k=30))}."} for _ in range(100)]
NEW = [english(DRAW) if number % 7 < 5 else chinese(DRAW) for number in range(84)]


@pytest.fixture(scope="module")
def planned(tmp_path_factory, bytes_dir):
    """Plans of corpora: {file: records} -> plan directory."""
    root = tmp_path_factory.mktemp("drift")

    def plan(name: str, feeds: dict[str, list[dict[str, str]]], documents: list[dict[str, str]] = DOCUMENTS) -> Path:
        for feed, records in {**{f"i/{name}": one for name, one in feeds.items()}, "p/documents": documents}.items():
            path = root / name / f"{feed}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        folders = {"instruction_tuning_data_dir": f"{root / name}/i", "pretraining_data_dir": f"{root / name}/p"}
        corpus = CorpusSettings(**{key: value for key, value in folders.items() if any(Path(value).iterdir())})
        if not documents:
            corpus = corpus.model_copy(update={"pretraining_data_dir": None})
        pack = PackSettings(max_seq_length=512)
        return Path(prepare(corpus, TokenizeSettings(), pack, bytes_dir, root / "cache").path)

    return plan


@pytest.fixture(scope="module")
def before(planned) -> profile.Profile:
    return profile.take_profile(planned("before", OLD))


def compared(plan_dir: Path, before: profile.Profile) -> list[drift.Finding]:
    return drift.compare(before, profile.take_profile(plan_dir), profile.new_records(plan_dir, before))


@pytest.mark.parametrize("feeds", [OLD, {**OLD, "week": NEW}], ids=["unchanged", "grown"])
def test_more_of_the_same_is_no_change(planned, before, feeds):
    assert compared(planned(f"same {len(feeds)}", feeds), before) == []


FAULTS = {
    "answers that do not end": [{**one, "target": one["target"][: len(one["target"]) // 3]} for one in NEW],
    "answers that read like prompts": [{"input": one["target"], "target": one["input"]} for one in NEW],
    "one answer to many prompts": [{**one, "target": "I cannot help you with that."} for one in NEW],
    "broken encoding": [{**one, "target": f"{one['target']} caf\u00c3\u00a9 \u00e4\u00b8\u00ad."} for one in NEW],
    "duplicates": OLD["en"][:80],
}


@pytest.mark.parametrize("measure", FAULTS)
def test_a_broken_feed_is_named_though_it_is_a_tenth_of_all(planned, before, measure):
    plan_dir = planned(measure, {**OLD, "week": FAULTS[measure]})
    found = next(one for one in compared(plan_dir, before) if one.measure == measure)
    assert found.slice == "new records of instruction" and found.chance < 0.005
    lines = profile.places(plan_dir, found.rows)
    assert lines and all(Path(line).name.startswith("week.jsonl:") for line in lines)


def test_a_language_and_a_source_that_goes(planned, before):
    many = {"en": OLD["en"][:250], "zh": OLD["zh"], "more": [chinese(DRAW) for _ in range(250)]}
    found = {one.measure: one for one in compared(planned("swapped", many, []), before)}
    assert "written in" in found["scripts of answers"].says and found["scripts of answers"].effect > 0.3
    assert (found["records of a source"].slice, found["records of a source"].now) == ("pretraining", 0)


def test_a_profile_outlives_its_corpus(before, tmp_path):
    profile.save(before, tmp_path / "x.arrow")
    content = (tmp_path / "x.arrow").read_bytes()
    again = profile.load(content)
    assert again.counts == before.counts and np.array_equal(again.known, before.known)
    assert len(again.sample) == 800 and np.array_equal(again.sample.grams, before.sample.grams)
    assert drift.compare(before, again, again.sample[:0]) == []
    for damaged in (b"", content[: len(content) // 2], content.replace(b'"format"', b'"farmat"')):
        with pytest.raises(PandaError, match="profile of a corpus"):
            profile.load(damaged)


def test_the_tests_are_those_of_statistics():
    """Which are made from the samples themselves in scipy, here from a distance or an area."""
    generator = np.random.default_rng(0)
    low, high = generator.normal(size=300), generator.normal(0.2, size=200)
    test = stats.ks_2samp(low, high, method="asymp")
    assert drift.chance_of_distance(test.statistic, 300, 200) == pytest.approx(test.pvalue, rel=0.2)
    rank = stats.mannwhitneyu(high, low, method="asymptotic", use_continuity=False)
    assert drift.area_under(low, high) == pytest.approx(rank.statistic / 60_000)
    assert drift.chance_of_area(drift.area_under(low, high), 300, 200) == pytest.approx(rank.pvalue, rel=1e-6)
