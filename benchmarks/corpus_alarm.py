"""How often the corpus alarm is wrong, which faults it names, and what it costs.

In: real corpora. Out: alarms among resamples of an unchanged corpus (two halves of its records that share none; and a
tenth of new records of the same kind), the findings of planted faults, each in a corpus that has grown by a tenth, and
the time beside that of the preparation of a made corpus of --megabytes.

    python -m benchmarks.corpus_alarm --real CORPORA --resamples 100 --megabytes 100

Cost: a minute on two cores.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.corpus import write_corpus
from data_prep.inspection import drift
from data_prep.inspection.profile import Profile, new_records, take_profile
from data_prep.pipeline import prepare
from data_prep.plan.build import PlanResult
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings

Record = dict[str, Any]
Feeds = dict[str, list[Record]]
"""File -> its records; those of c4 are documents."""


def main() -> None:
    """Print three tables."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--real", type=Path, required=True)
    options.add_argument("--resamples", type=int, default=100)
    options.add_argument("--megabytes", type=int, default=100)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="corpus-alarm-") as directory:
        corpora = _Corpora(Path(directory), given.real)
        if given.resamples:
            _resamples(take_profile(corpora.plan("all", corpora.feeds)), given.resamples)
        _faults(corpora)
        if given.megabytes:
            _cost(corpora, given.megabytes)


class _Corpora:
    """Writes corpora and prepares them, with one tokenizer."""

    def __init__(self, root: Path, real: Path):
        self.root = root
        self.tokenizer: Path | None = None
        self.feeds: Feeds = {}
        for path in sorted(real.rglob("*.json*")):
            text = path.read_text(encoding="utf-8")
            records = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
            np.random.default_rng(0).shuffle(records)
            self.feeds[path.stem] = records

    def plan(self, name: str, feeds: Feeds) -> Path:
        folder = self.root / name
        for feed, records in feeds.items():
            kind = "pretraining" if records and "text" in records[0] else "instruction"
            path = folder / kind / f"{feed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        return Path(self.prepare(folder).path)

    def prepare(self, folder: Path) -> PlanResult:
        corpus = CorpusSettings(
            instruction_tuning_data_dir=str(folder / "instruction"),
            pretraining_data_dir=str(folder / "pretraining") if (folder / "pretraining").is_dir() else None,
        )
        pack = PackSettings(max_seq_length=1024)
        made = prepare(corpus, TokenizeSettings(), pack, self.tokenizer, self.root / "cache")
        self.tokenizer = Path(made.tokenizer_dir)
        return made


def _resamples(whole: Profile, num: int) -> None:
    generator = np.random.default_rng(1)
    raised = {"two halves": 0, "a tenth more": 0}
    for number in range(num):
        drawn = generator.random(len(whole.sample))
        halves = number % 2 == 0
        before = _part(whole, drawn < (0.5 if halves else 0.9))
        now = _part(whole, (drawn >= 0.5) if halves else (drawn < 1.1))
        new = whole.sample[drawn >= (0.5 if halves else 0.9)]
        found = drift.compare(before, now, new)
        raised["two halves" if halves else "a tenth more"] += bool(found)
        for finding in found:
            print(f"  resample {number}: {finding.measure}, {finding.slice}: {finding.says}")
    print(f"unchanged corpus, {len(whole.sample):,} records, {num} resamples: alarms {raised}")


def _part(whole: Profile, chosen: np.ndarray) -> Profile:
    """The profile of some of the records of a profile that describes all."""
    sample = whole.sample[chosen]
    sizes = np.bincount(sample.source, minlength=len(whole.sources)).tolist()
    counts = {
        name: replace(one, records=size, rejected={}, duplicates=0)
        for (name, one), size in zip(whole.counts.items(), sizes, strict=True)
    }
    return replace(whole, sample=sample, counts=counts, known=np.sort(sample.key))


def _cut(record: Record) -> Record:
    return record | {"output": record["output"][: len(record["output"]) // 3]}


def _exchanged(record: Record) -> Record:
    return {
        "instruction": record["output"],
        "input": "",
        "output": f"{record['instruction']} {record['input']}".strip(),
    }


def _broken(record: Record) -> Record:
    return {key: text.encode().decode("latin-1") for key, text in record.items()}


def _boilerplate(record: Record) -> Record:
    return record | {"output": "I am sorry, but as a language model I cannot help you with that request."}


def _same(record: Record) -> Record:
    return record


FAULTS: dict[str, tuple[str, Callable[[Record], Record], str]] = {
    "answers cut": ("alpaca_en_demo", _cut, "answers that do not end"),
    "prompts and answers exchanged": ("alpaca_en_demo", _exchanged, "answers that read like prompts"),
    "one boilerplate answer": ("alpaca_en_demo", _boilerplate, "one answer to many prompts"),
    "broken encoding": ("alpaca_zh_demo", _broken, "broken encoding"),
}
"""Name -> the feed that breaks, how, and the measure that has to name it."""


def _faults(corpora: _Corpora) -> None:
    """This week's corpus is the earlier one and a tenth more, in which something is wrong."""
    feeds = corpora.feeds
    old = {name: records[: len(records) * 9 // 10] for name, records in feeds.items()}
    before = take_profile(corpora.plan("before", old))
    more = {f"{name}_new": records[len(records) * 9 // 10 :] for name, records in feeds.items()}
    cases: dict[str, tuple[Feeds, str]] = {"nothing wrong": ({**old, **more}, "")}
    for name, (feed, spoil, measure) in FAULTS.items():
        broken = {f"{feed}_new": [spoil(one) for one in more[f"{feed}_new"]]}
        cases[name] = ({**old, **more, **broken}, measure)
    cases["a feed sent twice"] = ({**old, **more, "again": more["alpaca_en_demo_new"]}, "duplicates")
    cases["a source gone"] = (
        {name: records for name, records in {**old, **more}.items() if "c4" not in name},
        "records of a source",
    )
    for name, (now, measure) in cases.items():
        _tell(name, corpora.plan(name, now), before, measure)
    few = {"en": feeds["alpaca_en_demo"][:760], "zh": feeds["alpaca_zh_demo"][:40]}
    many = {"en": feeds["alpaca_en_demo"][:480], "zh": feeds["alpaca_zh_demo"][:320]}
    earlier = take_profile(corpora.plan("few", few))
    _tell("Chinese 5 -> 40 %", corpora.plan("many", many), earlier, "scripts of answers")


def _tell(name: str, plan_dir: Path, before: Profile, measure: str) -> None:
    found = drift.compare(before, take_profile(plan_dir), new_records(plan_dir, before))
    named = "named" if measure in {one.measure for one in found} else "NOT NAMED" if measure else f"{len(found)} alarms"
    print(f"{name}: {named}")
    for one in found:
        print(f"    {one.measure} ({one.slice}): {one.says}; effect {one.effect:.2f}, chance {one.chance:.1e}")


def _cost(corpora: _Corpora, megabytes: int) -> None:
    folder = corpora.root / "made"
    write_corpus(next(iter(corpora.root.glob("all"))), folder, megabytes)
    begun = time.perf_counter()
    plan_dir = Path(corpora.prepare(folder).path)
    prepared = time.perf_counter()
    profile = take_profile(plan_dir)
    taken = time.perf_counter()
    drift.compare(profile, profile, new_records(plan_dir, profile))
    compared = time.perf_counter()
    alarm = compared - prepared
    print(
        f"{megabytes} MB, {sum(one.records for one in profile.counts.values()):,} records: preparation "
        f"{prepared - begun:.2f} s, profile {taken - prepared:.2f} s, comparison {compared - taken:.2f} s: "
        f"{alarm / (prepared - begun):.1%}"
    )


if __name__ == "__main__":
    main()
