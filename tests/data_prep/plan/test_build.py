"""Plans: verdicts and rows on literal arrays, and for any corpus that no token is lost or trained twice."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import store, targets
from data_prep.errors import CorpusError, StoreError, TokenizerError
from data_prep.pipeline import prepare
from data_prep.plan.build import make_rows, plan_fingerprint
from data_prep.plan.examples import Examples
from data_prep.plan.reader import IGNORED, open_plan
from data_prep.plan.report import check_conservation
from data_prep.plan.verdicts import ACCEPTED, REASONS, TRAIN, VALIDATION, judge, weights_of
from data_prep.records.reasons import Reason
from data_prep.records.shard import shard_records
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokens.tokenize import tokenize_records
from tests.support.tokenizers import bytes_core, save

EVERYTHING = CorpusSettings(validation_fraction=0)


def examples_of(*runs, pretraining=(), same=()):
    """Examples from their runs. ``pretraining`` are of that source, ``same`` have the content of example 0."""
    number = np.arange(len(runs), dtype=np.int32)
    hashes = np.random.default_rng(7).integers(0, 256, (len(runs), 16)).astype(np.uint8)
    hashes[list(same)] = hashes[0]
    document = np.isin(number, pretraining)
    return Examples(
        units=[],
        sources=["instruction", "pretraining"],
        shard=np.zeros(len(runs), dtype=np.int32),
        number=number,
        source=document.astype(np.int8),
        pretraining=document,
        hashes=hashes,
        lengths=np.array([sum(run) for run in runs], dtype=np.int32),
        runs=np.array([length for run in runs for length in run], dtype=np.int32),
        run_offsets=np.cumsum([0, *map(len, runs)], dtype=np.int64),
    )


def reasons(verdicts):
    return [None if reason == ACCEPTED else REASONS[reason] for reason in verdicts.reason.tolist()]


def parts(pieces):
    return list(zip(pieces.example.tolist(), pieces.start.tolist(), pieces.length.tolist(), strict=True))


def test_targets_of_literal_segments():
    examples = examples_of([2, 3], [0, 4], [1, 2, 3, 1], [5], [])
    assert examples.targets.tolist() == [3, 3, 3, 0, 0]
    assert examples.prompt.tolist() == [2, 0, 1, 5, 0]
    segments = [(0, 0, 4), (0, 2, 3), (0, 3, 1), (1, 1, 2), (2, 3, 4), (2, 0, 2), (3, 0, 5), (4, 0, 0)]
    example, start, length = (np.array(column) for column in zip(*segments, strict=True))
    assert examples.targets_of(example, start, length).tolist() == [2, 2, 0, 1, 1, 1, 0, 0]


def test_the_first_reason_counts():
    examples = examples_of([2, 3], [2, 3], [5], [0, 1], [2, 30], same=[1])
    verdicts, pieces = judge(examples, EVERYTHING, PackSettings(max_seq_length=8), None)
    assert reasons(verdicts) == [
        None, Reason.DUPLICATE, Reason.NO_TARGET_TOKENS, Reason.NO_TARGET_TOKENS, Reason.TOO_LONG,
    ]  # fmt: skip
    assert verdicts.copies.tolist() == [1, 0, 0, 0, 0]
    assert parts(pieces) == [(0, 0, 5)]


@pytest.mark.parametrize(
    ("overflow", "runs", "expected", "cut"),
    [
        ("drop", [4, 6], None, 0),
        ("truncate_prompt_left", [4, 6], [(2, 8)], 2),
        ("truncate_prompt_left", [2, 8], None, 0),  # not one token of the prompt would be left
        ("truncate_prompt_left", [3, 7], [(2, 8)], 2),
        ("truncate_target", [4, 6], [(0, 8)], 2),
        ("truncate_target", [8, 2], None, 0),  # no target would be left
        ("split", [4, 6], [(0, 8), (8, 2)], 0),
        ("split", [9, 6], [(8, 7)], 8),  # a part without target is in no row
        ("split", [12, 1], [(8, 5)], 8),
        ("drop", [4, 4], [(0, 8)], 0),
    ],
)
def test_overflow_by_eye(overflow, runs, expected, cut):
    pack = PackSettings(max_seq_length=8, overflow=overflow)
    verdicts, pieces = judge(examples_of(runs), EVERYTHING, pack, None)
    assert reasons(verdicts) == [None if expected else Reason.TOO_LONG]
    assert [part[1:] for part in parts(pieces)] == (expected or [])
    assert verdicts.cut.tolist() == [cut]


def test_documents_are_cut_whatever_overflow_says():
    examples = examples_of([0, 20], [0, 20], pretraining=[0])
    for pack in (PackSettings(max_seq_length=8), PackSettings(max_seq_length=8, packing=False)):
        verdicts, pieces = judge(examples, EVERYTHING, pack, None)
        assert reasons(verdicts) == [None, Reason.TOO_LONG]
        rows = make_rows(examples, verdicts, pieces, TRAIN, pack)
        assert sorted(zip(rows.start.tolist(), rows.length.tolist(), strict=True)) == [(0, 8), (8, 8), (16, 4)]


def test_weights_are_inherited_and_checked():
    sources = ["instruction", "instruction/medical", "pretraining"]
    tokens = np.array([600, 400, 500])

    def weights(mixture, by="epochs"):
        return weights_of(sources, tokens, PackSettings(mixture=mixture, mixture_by=by)).tolist()

    assert weights(None) == [1, 1, 1]
    assert weights({"instruction": 2, "instruction/medical": 0.5}) == [2, 0.5, 1]
    assert weights({"instruction": 2}) == [2, 2, 1]
    with pytest.raises(CorpusError, match=r"mixture: medical: 3.0: not a source.*instruction/medical"):
        weights({"medical": 3})
    assert weights({"instruction": 0.5, "pretraining": 0.5}, "share") == [0.5, 0.5, 1]
    assert weights({"instruction": 9, "pretraining": 1}, "share") == pytest.approx([1, 1, 1000 / 9 / 500])
    assert weights({"instruction": 1, "instruction/medical": 1, "pretraining": 0}, "share") == pytest.approx(
        [2 / 3, 1, 0]
    )
    with pytest.raises(CorpusError, match="mixture says nothing of pretraining"):
        weights({"instruction": 1}, "share")


def test_shares_of_tokens_come_out_as_stated():
    examples = examples_of(*[[1, 9]] * 4000, *[[0, 20]] * 1000, pretraining=range(4000, 5000))
    pack = PackSettings(mixture={"instruction": 0.3, "pretraining": 0.7}, mixture_by="share")
    verdicts, pieces = judge(examples, EVERYTHING, pack, None)
    rows = make_rows(examples, verdicts, pieces, TRAIN, pack)
    tokens = np.bincount(rows.source, weights=rows.length)
    assert tokens[0] / tokens.sum() == pytest.approx(0.3, abs=0.02)
    assert tokens[1] == 20_000


def test_a_fraction_of_a_source_only_grows_with_its_weight():
    examples = examples_of(*[[1, 2]] * 2000)
    chosen = []
    for weight in (0.25, 0.5, 1.75):
        verdicts, _ = judge(examples, EVERYTHING, PackSettings(mixture={"instruction": weight}), None)
        assert abs(verdicts.copies.mean() - weight) < 0.04
        chosen.append(set(np.flatnonzero(verdicts.copies == max(1, int(weight) + 1)).tolist()))
    assert chosen[0] < chosen[1] < chosen[2]
    verdicts, _ = judge(examples, EVERYTHING, PackSettings(mixture={"instruction": 0.5}), None)
    assert set(reasons(verdicts)) == {None, Reason.NOT_SAMPLED}


def test_the_split_depends_on_content_alone():
    examples = examples_of(*[[1, 2]] * 3000, same=range(100))
    corpus = CorpusSettings(validation_fraction=0.1, deduplicate="none")
    verdicts, _ = judge(examples, corpus, PackSettings(seed=1, mixture={"instruction": 0.5}), None)
    assert len(set(verdicts.split[:100].tolist())) == 1
    assert 0.08 < (verdicts.split[100:] == VALIDATION).mean() < 0.12
    other, _ = judge(examples, corpus, PackSettings(seed=2), None)
    assert other.split.tolist() == verdicts.split.tolist()
    more, _ = judge(examples, CorpusSettings(validation_fraction=0.2), PackSettings(), None)
    assert (more.split >= verdicts.split).all()
    assert (verdicts.copies[verdicts.split == VALIDATION] == 1).all()  # the mixture is for training


def test_near_duplicates_are_asked_for_only_when_wanted():
    examples = examples_of([1, 2], [1, 2])
    near = CorpusSettings(deduplicate="near", validation_fraction=0)
    verdicts, _ = judge(examples, near, PackSettings(), lambda: np.array([False, True]))
    assert reasons(verdicts) == [None, Reason.NEAR_DUPLICATE]


def test_near_duplicates_are_found_once(tmp_path, bytes_dir, monkeypatch):
    story = "Once upon a time there was a panda who trained language models all day long, and never ran out of memory."
    records = [{"input": "tell", "target": text} for text in (story, story.replace("panda", "Panda"), "something else")]
    corpus = write_corpus(tmp_path, {"instruction/a.jsonl": [*records, *pairs(*range(20))]})
    corpus = corpus.model_copy(update={"deduplicate": "near", "validation_fraction": 0})
    pack = PackSettings(max_seq_length=256)
    result = prepare(corpus, TokenizeSettings(), pack, bytes_dir, tmp_path / "cache")
    assert result.report["dropped"]["near_duplicate"] >= 1
    monkeypatch.setattr("data_prep.plan.build.near_duplicates", None)  # it would fail if called
    again = prepare(corpus, TokenizeSettings(), pack.model_copy(update={"seed": 1}), bytes_dir, tmp_path / "cache")
    assert again.report["dropped"] == result.report["dropped"]


def test_near_duplicates_do_not_depend_on_the_number_of_workers(tmp_path, bytes_dir, monkeypatch):
    monkeypatch.setattr("data_prep.plan.build.MIN_BYTES_FOR_PROCESSES", 0)
    texts = [f"The panda number {n} eats bamboo in the morning and trains a model in the evening." for n in range(6)]
    files = {f"instruction/{name}.jsonl": [{"input": name, "target": text} for text in texts] for name in "abc"}
    corpus = write_corpus(tmp_path, files).model_copy(update={"deduplicate": "near", "validation_fraction": 0})
    masks = []
    for workers in (1, 2):
        cache = tmp_path / f"cache-{workers}"
        few = corpus.model_copy(update={"prepare_workers": workers})
        prepare(few, TokenizeSettings(), PackSettings(max_seq_length=256), bytes_dir, cache)
        masks.append(next(cache.glob("near_duplicates/*/near.npy")).read_bytes())
    assert masks[0] == masks[1]
    assert 0 < np.load(next(cache.glob("near_duplicates/*/near.npy"))).sum() < 18


def test_without_packing_an_example_is_a_row():
    examples = examples_of([1, 2], [1, 3], [1, 4])
    pack = PackSettings(max_seq_length=64, packing=False)
    rows = make_rows(examples, *judge(examples, EVERYTHING, pack, None), TRAIN, pack)
    assert rows.row_offsets.tolist() == [0, 1, 2, 3]
    assert sorted(rows.tokens.tolist()) == [3, 4, 5]


def test_seed_changes_which_examples_share_a_row():
    examples = examples_of(*[[1, 7]] * 40)
    pairs = set()
    for seed in range(4):
        pack = PackSettings(max_seq_length=16, seed=seed)
        rows = make_rows(examples, *judge(examples, EVERYTHING, pack, None), TRAIN, pack)
        assert rows.num_rows == 20
        pairs.add(tuple(rows.example.tolist()))
    assert len(pairs) == 4


def test_a_wrong_number_stops_the_plan():
    examples = examples_of([1, 2], [1, 3])
    pack = PackSettings(max_seq_length=64)
    verdicts, pieces = judge(examples, EVERYTHING, pack, None)
    rows = {"train": make_rows(examples, verdicts, pieces, TRAIN, pack), "validation": _no_rows(examples, pack)}
    report = {"accepted": 2, "rejected": {"wrong_type": 1}, "dropped": {}, "records_in": 3, "rows": 1}
    check_conservation(report, examples, verdicts, rows)
    with pytest.raises(StoreError, match="4 records in, but 3"):
        check_conservation({**report, "records_in": 4}, examples, verdicts, rows)
    verdicts.copies[0] = 2
    with pytest.raises(StoreError, match="have 10 tokens, the plan has 7"):
        check_conservation(report, examples, verdicts, rows)


def _no_rows(examples, pack):
    return make_rows(examples, *judge(examples, EVERYTHING, pack, None), VALIDATION, pack)


# ------------------------------------------------------------------------------------------------ files


def write_corpus(directory: Path, files: dict[str, list[dict]]) -> CorpusSettings:
    for name, records in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    present = {kind: directory / kind for kind in ("instruction", "pretraining") if (directory / kind).exists()}
    return CorpusSettings(
        instruction_tuning_data_dir=str(present["instruction"]) if "instruction" in present else None,
        pretraining_data_dir=str(present["pretraining"]) if "pretraining" in present else None,
        validation_fraction=0.25,
    )


def pairs(*numbers):
    return [{"input": f"question {i}", "target": f"answer {i}"} for i in numbers]


def test_the_ledger_tells_every_record(tmp_path, bytes_dir):
    corpus = write_corpus(
        tmp_path,
        {
            "instruction/a.jsonl": [
                *pairs(1, 2),
                {"input": "no target"},
                *pairs(1),
                {"input": "q", "target": "x" * 99},
            ],
            "instruction/medical/b.jsonl": pairs(3, 4, 5, 6),
            "pretraining/c.jsonl": [{"text": "a document of more than one row, so it is cut"}],
        },
    )
    corpus = corpus.model_copy(update={"max_rejected_fraction": 0.5})
    result = prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=32), bytes_dir, tmp_path / "cache")
    ledger = pa.ipc.open_file(str(Path(result.path) / "ledger.arrow")).read_all().to_pylist()
    told = [(Path(e["file"]).name, e["line"], e["source"], e["verdict"], e["reason"], e["tokens"]) for e in ledger]
    pair_tokens = len("question 1" + "answer 1") + 1
    assert told == [
        ("a.jsonl", 1, "instruction", "accepted", None, pair_tokens),
        ("a.jsonl", 2, "instruction", "accepted", None, pair_tokens),
        ("a.jsonl", 3, "instruction", "rejected", "missing_field", 0),
        ("a.jsonl", 4, "instruction", "dropped", "duplicate", pair_tokens),
        ("a.jsonl", 5, "instruction", "dropped", "too_long", 101),
        *(("b.jsonl", i, "instruction/medical", "accepted", None, pair_tokens) for i in range(1, 5)),
        ("c.jsonl", 1, "pretraining", "accepted", None, 46),
    ]
    assert [(e["shard"], e["example"]) for e in ledger] == [
        (0, 0), (0, 1), (-1, -1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0),
    ]  # fmt: skip
    assert ledger[0]["hash"] == ledger[3]["hash"]
    assert {e["split"] for e in ledger if e["verdict"] == "accepted"} <= {"train", "validation"}
    assert {e["split"] for e in ledger if e["verdict"] != "accepted"} == {None}
    report = result.report
    assert report["records_in"] == report["accepted"] + 1 + 2 == 10
    assert report["rejected"] == {"missing_field": 1}
    assert report["dropped"] == {"duplicate": 1, "too_long": 1}
    assert set(report["sources"]) == {"instruction", "instruction/medical", "pretraining"}
    assert sum(source["share"] for source in report["sources"].values()) == pytest.approx(1, abs=1e-5)


WAYS = {
    "split": ({}, {"overflow": "split"}),
    "drop": ({}, {"overflow": "drop"}),
    "prompt cut": ({}, {"overflow": "truncate_prompt_left"}),
    "without packing": ({}, {"packing": False}),
    "mixture": ({}, {"mixture": {"instruction": 2.5, "pretraining": 0.3}}),
    "shares": ({}, {"mixture": {"instruction": 0.5, "pretraining": 0.5}, "mixture_by": "share"}),
    "with duplicates": ({"deduplicate": "none"}, {}),
    "replay": ({"replay_share": 0.3}, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_columns_in_files_and_in_blocks_give_the_same_bytes(way, tmp_path, bytes_dir, monkeypatch):
    """Of a corpus of several units, sources and files, with documents, long, equal and rejected records among them."""
    names = [f"instruction/{name}/{name}.jsonl" for name in "abc"]
    files = {name: [*pairs(*range(at, at + 30)), {}] for at, name in enumerate(names)}
    files["instruction/long.jsonl"] = [{"input": "q" * n, "target": "a" * (90 - n)} for n in range(5, 85, 3)]
    files["pretraining/d.jsonl"] = [{"text": f"{n} " * (n + 1)} for n in range(50)]
    of_corpus, of_pack = WAYS[way]
    corpus = write_corpus(tmp_path, files).model_copy(update={"validation_fraction": 0.2})
    pack = PackSettings(max_seq_length=64, **{"overflow": "split", **of_pack})
    if "replay_share" in of_corpus:
        of_corpus["replay_of"] = prepare(corpus, TokenizeSettings(), pack, bytes_dir, tmp_path / "first").path
    corpus = corpus.model_copy(update=of_corpus)

    def hashes(cache):
        plan = prepare(corpus, TokenizeSettings(), pack, bytes_dir, tmp_path / cache)
        return [entry["xxh3"] for entry in store.open_manifest(Path(plan.path))["files"].values()]

    in_memory = hashes("here")
    monkeypatch.setattr("data_prep.plan.columns.MAPPED_BYTES", 1)
    monkeypatch.setattr("data_prep.plan.columns.BLOCK", 7)
    assert hashes("mapped") == in_memory and len(in_memory) == 3


def test_report_has_the_documented_fields(tmp_path, bytes_dir):
    corpus = write_corpus(tmp_path, {"instruction/a.jsonl": pairs(*range(40))})
    first = prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=64), bytes_dir, tmp_path / "cache").report
    assert set(first) >= {
        "records_in", "accepted", "rejected", "dropped", "tokens", "target_tokens", "rows", "utilisation", "seconds",
        "reused", "peak_rss_bytes", "validation_rows", "validation_tokens", "validation_target_tokens", "sources",
        "engines", "proof",
    }  # fmt: skip
    assert first["reused"] == {"records": False, "tokenize": False, "plan": False}
    again = prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=64), bytes_dir, tmp_path / "cache").report
    assert again["reused"] == {"records": True, "tokenize": True, "plan": True}
    moving = ("seconds", "reused", "peak_rss_bytes")
    assert {k: v for k, v in first.items() if k not in moving} == {k: v for k, v in again.items() if k not in moving}
    json.dumps(first)


def test_nothing_to_train_on_is_an_error(tmp_path, bytes_dir):
    corpus = write_corpus(tmp_path, {"instruction/a.jsonl": [{"input": "q", "target": "x" * 50}]})
    with pytest.raises(CorpusError, match=r"nothing to train on.*too_long"):
        prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=16), bytes_dir, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "plans").glob("[!.]*"))


def test_overflow_error_names_the_records(tmp_path, bytes_dir):
    corpus = write_corpus(tmp_path, {"instruction/a.jsonl": [*pairs(1), {"input": "q", "target": "x" * 50}]})
    pack = PackSettings(max_seq_length=32, overflow="error")
    with pytest.raises(CorpusError, match=r"a\.jsonl:2: 52 tokens\nRaise max_seq_length to 52"):
        prepare(corpus, TokenizeSettings(), pack, bytes_dir, tmp_path / "cache")


text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).filter(str.strip)
pair = st.fixed_dictionaries({"input": text, "target": text})
turn = st.tuples(text, text).map(
    lambda texts: [{"from": "human", "value": texts[0]}, {"from": "gpt", "value": texts[1]}]
)
chat = st.lists(turn, min_size=1, max_size=3).map(
    lambda turns: {"conversations": [message for turn in turns for message in turn]}
)
document = st.fixed_dictionaries(
    {"text": st.text(st.sampled_from("ab 一\n"), min_size=1, max_size=200).filter(str.strip)}
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    instruction=st.lists(st.one_of(pair, chat), min_size=1, max_size=12),
    pretraining=st.lists(document, max_size=6),
    pack=st.builds(
        PackSettings,
        max_seq_length=st.integers(8, 64),
        packing=st.booleans(),
        overflow=st.sampled_from(["drop", "truncate_prompt_left", "truncate_target", "split"]),
        mixture=st.one_of(st.none(), st.fixed_dictionaries({"instruction": st.sampled_from([0, 0.5, 1, 2.5])})),
        seed=st.integers(0, 3),
    ),
)
def test_any_corpus_any_setting(tmp_path_factory, bytes_dir, instruction, pretraining, pack):
    root = tmp_path_factory.mktemp("any")
    files = {"instruction/a.jsonl": instruction, **({"pretraining/b.jsonl": pretraining} if pretraining else {})}
    corpus = write_corpus(root, files)
    try:
        result = prepare(corpus, TokenizeSettings(), pack, bytes_dir, root / "cache")
    except CorpusError as error:
        assert "nothing to train on" in str(error)
        return
    ledger = pa.ipc.open_file(str(Path(result.path) / "ledger.arrow")).read_all().to_pylist()
    assert len(ledger) == len(instruction) + len(pretraining)
    plans = {split: open_plan(Path(result.path), split) for split in ("train", "validation")}
    for split, plan in plans.items():
        _check_rows(plan, pack)
        _check_tokens(plan, [entry for entry in ledger if entry["split"] == split], bytes_dir)


def _check_rows(plan, pack):
    """No row too long, the counts of the plan are those of the batches, every row and segment has a target."""
    for row in range(plan.num_rows):
        batch = plan.batch(np.array([row]))
        assert batch.input_ids.shape[1] == plan.row_tokens[row] <= pack.max_seq_length
        assert (batch.labels != IGNORED).sum() == plan.row_target_tokens[row] > 0
        starts = np.flatnonzero(batch.position_ids[0] == 0)
        assert (batch.labels[0, starts] == IGNORED).all()
        for labels in np.split(batch.labels[0], starts[1:]):
            assert (labels != IGNORED).any()
        kept = batch.labels[0] != IGNORED
        assert (batch.labels[0, kept] == batch.input_ids[0, kept]).all()


def _check_tokens(plan, accepted, bytes_dir):
    """Every token of every accepted example is in the rows as often as the ledger says, less those it calls cut."""
    rows = plan.rows
    covered = {}
    for shard, example, start, length in zip(rows.shard, rows.example, rows.start, rows.length, strict=True):
        covered.setdefault((shard, example), Counter()).update(range(start, start + length))
    assert set(covered) == {(entry["shard"], entry["example"]) for entry in accepted}
    for entry in accepted:
        counts = covered[entry["shard"], entry["example"]]
        assert set(counts.values()) == {entry["copies"]}
        assert len(counts) == entry["tokens"] - entry["cut_tokens"]
        assert max(counts) < entry["tokens"]


# ------------------------------------------------------------------------------------------------ what costs what


@pytest.fixture(scope="module")
def staged(tmp_path_factory, bytes_dir):
    root = tmp_path_factory.mktemp("staged")
    corpus = write_corpus(
        root, {"instruction/a.jsonl": pairs(*range(60)), "instruction/b.jsonl": pairs(*range(90, 99))}
    )
    records = shard_records(corpus, root / "cache")
    return root, corpus, records


@pytest.mark.parametrize(
    "change",
    [{"max_seq_length": 40}, {"seed": 1}, {"packing": False}, {"overflow": "split"}, {"mixture": {"instruction": 2}}],
)
def test_packing_settings_make_a_new_plan_and_no_new_tokens(staged, bytes_dir, change):
    root, corpus, _ = staged
    first = prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=64), bytes_dir, root / "cache")
    other = prepare(
        corpus, TokenizeSettings(), PackSettings(**{"max_seq_length": 64, **change}), bytes_dir, root / "cache"
    )
    assert other.fingerprint != first.fingerprint
    assert other.report["reused"]["records"]
    assert other.report["reused"]["tokenize"]


@pytest.mark.parametrize("change", [{"validation_fraction": 0.5}, {"deduplicate": "none"}, {"deduplicate": "near"}])
def test_settings_of_the_plan_flip_its_fingerprint(staged, bytes_dir, change):
    root, corpus, records = staged
    tokens = tokenize_records(records, TokenizeSettings(), bytes_dir, root / "cache")
    changed = corpus.model_copy(update=change)
    assert plan_fingerprint(tokens, corpus, PackSettings()) != plan_fingerprint(tokens, changed, PackSettings())


@pytest.mark.parametrize(
    "change", [{"prepare_workers": 3}, {"max_rejected_fraction": 0.5}, {"near_duplicate_threshold": 0.5}]
)
def test_settings_that_change_no_row_change_no_fingerprint(staged, bytes_dir, change):
    root, corpus, records = staged
    tokens = tokenize_records(records, TokenizeSettings(), bytes_dir, root / "cache")
    changed = corpus.model_copy(update=change)
    assert plan_fingerprint(tokens, corpus, PackSettings()) == plan_fingerprint(tokens, changed, PackSettings())


def test_template_and_tokenizer_retokenize_and_engine_does_not(staged, bytes_dir, llama_dir):
    root, _, records = staged
    first = tokenize_records(records, TokenizeSettings(), bytes_dir, root / "cache")
    for settings_, directory in [(TokenizeSettings(template="alpaca"), bytes_dir), (TokenizeSettings(), llama_dir)]:
        other = tokenize_records(records, settings_, directory, root / "cache")
        assert not {unit.fingerprint for unit in other.units} & {unit.fingerprint for unit in first.units}
    again = tokenize_records(records, TokenizeSettings(tokenizer_engine="reference"), bytes_dir, root / "cache")
    assert again.built == 0


def test_workers_and_engines_change_no_byte(staged, bytes_dir, monkeypatch):
    root, corpus, _ = staged
    monkeypatch.setattr("data_prep.tokens.tokenize.MIN_BYTES_FOR_PROCESSES", 0)
    monkeypatch.setattr("data_prep.tokens.tokenize.MIN_BYTES_FOR_PROCESSES_REFERENCE", 0)
    hashes = []
    for number, (workers, engine) in enumerate([(1, "auto"), (2, "auto"), (2, "reference")]):
        cache = root / f"cache-{number}"
        changed = corpus.model_copy(update={"prepare_workers": workers})
        prepare(changed, TokenizeSettings(tokenizer_engine=engine), PackSettings(max_seq_length=64), bytes_dir, cache)
        arrow = sorted(cache.rglob("*.arrow"))
        hashes.append({str(path.relative_to(cache)): store.hash_file(path) for path in arrow})
    assert len(hashes[0]) == 2 * 3 + 3
    assert hashes[0] == hashes[1] == hashes[2]


def test_a_new_file_costs_that_file(staged, bytes_dir):
    root, corpus, _ = staged
    prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=64), bytes_dir, root / "cache")
    (root / "instruction" / "c.jsonl").write_text(json.dumps({"input": "new", "target": "record"}))
    records = shard_records(corpus, root / "cache")
    tokens = tokenize_records(records, TokenizeSettings(), bytes_dir, root / "cache")
    assert (tokens.built, tokens.reused) == (1, 2)
    (root / "instruction" / "c.jsonl").unlink()


def test_a_damaged_shard_is_built_again(staged, bytes_dir, caplog):
    root, _, records = staged
    tokens = tokenize_records(records, TokenizeSettings(template="chatml"), bytes_dir, root / "cache")
    victim = Path(tokens.units[0].path) / "tokens.arrow"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-8])
    again = tokenize_records(records, TokenizeSettings(template="chatml"), bytes_dir, root / "cache")
    assert again.built == 1
    assert "tokens.arrow" in caplog.text
    assert victim.read_bytes() == whole


def test_the_same_file_twice_is_two_shards_of_one_unit(tmp_path, bytes_dir):
    corpus = write_corpus(
        tmp_path, {"instruction/a.jsonl": pairs(*range(20)), "instruction/b.jsonl": pairs(*range(20))}
    )
    result = prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=64), bytes_dir, tmp_path / "cache")
    assert result.report["dropped"] == {"duplicate": 20}
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1
    assert len(store.open_manifest(Path(result.path))["shards"]) == 2


def test_a_million_examples_are_planned_tightly():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 1, 1_000_000), 4, 2048).astype(np.int32)
    prompt = np.minimum(lengths // 3 + 1, lengths - 2)
    examples = Examples(
        units=[], sources=["instruction"], shard=np.zeros(1_000_000, np.int32),
        number=np.arange(1_000_000, dtype=np.int32), source=np.zeros(1_000_000, np.int8),
        pretraining=np.zeros(1_000_000, bool), hashes=rng.integers(0, 256, (1_000_000, 16), dtype=np.uint8),
        lengths=lengths, runs=np.stack([prompt, lengths - prompt], 1).ravel().astype(np.int32),
        run_offsets=np.arange(0, 2_000_001, 2, dtype=np.int64),
    )  # fmt: skip
    pack = PackSettings(max_seq_length=2048)
    verdicts, pieces = judge(examples, EVERYTHING, pack, None)
    rows = make_rows(examples, verdicts, pieces, TRAIN, pack)
    assert rows.tokens.sum(dtype=np.int64) / (2048 * rows.num_rows) > 0.998


def test_a_users_template_that_fails_names_the_record(tmp_path, bytes_dir):
    corpus = write_corpus(tmp_path, {"instruction/a.jsonl": pairs(1, 2, 3)})
    records = shard_records(corpus, tmp_path / "cache")
    for name, message in [
        ("failing", r"a\.jsonl:3: .*KeyError: 'oops'"),
        ("not_segments", r"a\.jsonl:1: .*not None"),
        ("no_text", r"a\.jsonl:1: .*surrogates not allowed"),
    ]:
        settings_ = TokenizeSettings(template={"_target_": f"users_functions.{name}"})
        with pytest.raises(TokenizerError, match=message):
            tokenize_records(records, settings_, bytes_dir, tmp_path / "cache")


def test_a_users_template_that_hangs_names_the_record(tmp_path, bytes_dir, monkeypatch):
    monkeypatch.setattr(targets, "LONGEST_SECONDS", 0.2)
    records = shard_records(write_corpus(tmp_path, {"instruction/a.jsonl": pairs(1)}), tmp_path / "cache")
    waiting = TokenizeSettings(template={"_target_": "users_functions.waiting"})
    with pytest.raises(TokenizerError, match=r"a\.jsonl:1: .*TimeoutError: no result after 0\.2 s"):
        tokenize_records(records, waiting, bytes_dir, tmp_path / "cache")


def test_a_chat_template_that_rewrites_names_the_record(tmp_path):
    source = "{% for m in messages %}{{ m.role }}:{{ m.content | replace('2', 'two') }}</s>{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    directory = save(bytes_core(), tmp_path / "tokenizer")
    (directory / "chat_template.jinja").write_text(source)
    records = shard_records(write_corpus(tmp_path, {"instruction/a.jsonl": pairs(1, 2)}), tmp_path / "cache")
    with pytest.raises(TokenizerError, match=r"a\.jsonl:2: .*rewrites a text"):
        tokenize_records(records, TokenizeSettings(template="tokenizer"), directory, tmp_path / "cache")
