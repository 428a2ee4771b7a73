"""Gate, aliases, rollback, lineage and takedown with a real corpus, real tiny models and a real MLflow database."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_prep.errors import PandaError
from data_prep.plan import tombstones
from data_prep.plan.ledger import open_ledger
from data_prep.plan.order import rows_of_step, steps_per_epoch
from data_prep.plan.reader import open_plan
from tests.support.corpora import NAME, NUMBERS, ROWS_PER_STEP, Project, add_version
from tests.support.mlflow_fixtures import server
from tests.support.ranks_here import alone
from training.bases.tokens import with_tokens
from training.compare import run_job, unseen
from training.comparison import approval, heldout
from training.comparison.job import read_job
from training.comparison.report import verdict_markdown
from training.launch.processes import free_port
from training.launch.run_config import read_config
from training.registry import lineage, promotion
from training.registry.promotion import settle
from training.registry.versions import CHALLENGER, CHAMPION, Registry, RegistryError
from training.run_files import GATE_RECORDS
from training.tracking.tags import APPROVAL_TAG, COMMENT_TAG, GATE_TAG, PARENT_TAG, REASONS_TAG

EMPTY = {"promoted": False, "reasons": [], "slices": [], "checks": []}

pytestmark = pytest.mark.usefixtures("load_back_here")


@pytest.fixture
def project(tmp_path, output_dir) -> Project:
    return Project(tmp_path, output_dir)


@pytest.fixture
def registry(output_dir) -> Registry:
    return Registry(f"sqlite:///{output_dir / 'mlflow.db'}")


def test_a_better_version_becomes_champion_a_worse_one_does_not_and_back(project, registry):
    first = add_version(project, "run-1", 4)
    assert first.version.aliases == [CHAMPION]
    assert "nothing to compare" in first.verdict["reasons"][0]

    better = add_version(project, "run-2", 60)
    assert better.version.aliases == [CHAMPION] and better.version.tags[GATE_TAG] == "passed"
    assert better.verdict["reference"] == f"champion models:/{NAME}/1"
    rows = {row["slice"]: row for row in better.verdict["slices"]}
    own = {"all", "instruction/cjk", "instruction/other"}
    assert set(rows) == {*own, "neutral/cjk", "neutral/other"}
    assert all(rows[name]["low"] > 0.5 for name in own) and rows["all"]["records"] == better.verdict["records"] > 40

    worse = add_version(project, "run-3", 20)
    assert worse.version.aliases == [CHALLENGER] and worse.version.tags[GATE_TAG] == "failed"
    assert "not better than the champion models:/panda-count/2 with confidence" in worse.verdict["reasons"][0]
    assert worse.verdict["records_digest"] == better.verdict["records_digest"]
    lines = [json.loads(line) for line in (worse.run_dir / GATE_RECORDS).read_text().splitlines()]
    assert len(lines) == worse.verdict["records"] + worse.verdict["records_elsewhere"]
    assert worse.verdict["records_elsewhere"] == 100 and set(lines[0]["loss"]) == {"candidate", "champion"}
    stored = registry.json_artifact(worse.version, "gate.json")
    assert stored["reasons"] == worse.verdict["reasons"]
    shown = registry.client.get_model_version(NAME, "3").description
    assert shown.startswith("**challenger**\n\n- not better than the champion") and "| all | " in shown

    assert registry.champion(NAME).version == 2
    with pytest.raises(RegistryError, match="has not passed the gate: not better than"):
        promotion.promote(registry, f"models:/{NAME}@challenger", despite_gate=False)
    promotion.promote(registry, f"{NAME}/3", despite_gate=True)
    assert registry.champion(NAME).version == 3
    now, before = promotion.rollback(registry, NAME)
    assert (now.version, before.version) == (2, 3) and registry.champion(NAME).version == 2
    assert promotion.rollback(registry, NAME)[0].version == 1
    with pytest.raises(RegistryError, match="replaced no other champion"):
        promotion.rollback(registry, NAME)


def test_a_smaller_gain_than_asked_for_is_not_enough(project):
    add_version(project, "run-1", 30)
    close = add_version(project, "run-2", 60, promote_min_gain=2.0)
    assert close.version.aliases == [CHALLENGER]
    assert "promote_min_gain=2.0" in close.verdict["reasons"][0] and close.verdict["slices"][0]["gain"] > 0


def test_a_version_is_compared_with_its_base_when_there_is_no_champion(project, registry):
    base = project.train("base", 30)
    worse = add_version(project, "run-1", 1, model_dir=base / "model")
    assert worse.verdict["reference"] == f"base {base / 'model'}"
    assert not worse.verdict["promoted"] or worse.verdict["slices"][0]["low"] > 0
    assert PARENT_TAG not in worse.version.tags  # the base was never registered


def test_records_the_champion_was_trained_on_do_not_count(project):
    first = add_version(project, "run-1", 4)
    plan_of_all = project.plan(validation_fraction=0).path
    job = read_job(first.run_dir)
    job = replace(job, champion=replace(job.candidate, name="models:/other/1"), champion_plan=plan_of_all)
    with alone() as ranks:
        result = run_job(read_config(first.run_dir / "config.yaml"), job, ranks)
    assert result["records"] == 0 and result["excluded_records"] > 40 and not result["promoted"]
    assert f"the champion was trained on all {result['excluded_records']} held-out records" in result["reasons"][0]


def test_held_out_records_that_were_trained_on_do_not_count(project):
    """A training record in other capitals and spacing, under the name of a held-out one."""
    plan_dir = Path(project.plan().path)
    held_out, ledger = heldout.choose(plan_dir, 400), open_ledger(plan_dir)
    trained = ledger.accepted("train").select(["file", "line", "shard", "example"]).to_pylist()[7]
    _, texts = ledger.read_texts([trained])
    copy = [text.upper().replace(" ", " - ") for text in texts.to_pylist()[0]]
    changed = replace(held_out, texts=pa.array([copy, *held_out.texts.to_pylist()[1:]], held_out.texts.type))
    left, rows = unseen(changed, plan_dir, 0.8)
    assert left.hashes == held_out.hashes[1:] and left.num_own == len(held_out) - 1
    assert rows == [{"record": held_out.places[0], "trained": f"{trained['file']}:{trained['line']}", "share": 1.0}]
    assert "is in " + rows[0]["trained"] + " (100%)" in verdict_markdown({**EMPTY, "overlaps": rows})


def test_what_the_champion_knew_must_not_be_forgotten(project, registry):
    """The corpus is replaced by another one: what was held out for the champion is in it no more."""
    add_version(project, "run-1", 60)
    lines = [{"input": f"{i}: say {word}", "target": word} for i, word in enumerate(NUMBERS * 30)]
    (project.data_dir / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    other = add_version(project, "run-2", 60)
    assert other.version.aliases == [CHALLENGER] and other.verdict["slices"][0]["low"] > 0
    assert other.verdict["reasons"][0].startswith(f"has forgotten: worse than the champion models:/{NAME}/1 on before/")
    assert {"before/instruction/cjk", "before/instruction/other"} < {row["slice"] for row in other.verdict["slices"]}


def test_a_champion_that_cannot_be_asked_stays_champion(project, registry):
    first = add_version(project, "run-1", 4)
    files = registry.files(first.version, project.cache_dir)
    (files / "model.safetensors").unlink()
    second = add_version(project, "run-2", 30)
    assert second.version.aliases == [CHALLENGER]
    assert second.verdict["reasons"][0].startswith(f"the champion models:/{NAME}/1 cannot be asked")


def test_a_description_that_is_too_long_for_mlflow_loses_lines_not_the_verdict(project, registry):
    first = add_version(project, "run-1", 1)
    many = {**first.verdict, "reasons": [f"reason {i} " + "of many words " * 5 for i in range(200)]}
    settle(registry, first.version, many)
    described = registry.client.get_model_version(NAME, "1").description
    assert 4800 < len(described) <= 5000 and described.splitlines()[-1].endswith("of many words ")


def test_a_champion_that_changed_meanwhile_is_not_replaced(project, registry):
    add_version(project, "run-1", 4)
    second = add_version(project, "run-2", 30)
    late = {**second.verdict, "champion": "models:/panda-count/9"}
    assert not settle(registry, registry.resolve(f"{NAME}/1"), late)
    assert "the champion has changed" in late["reasons"][0] and registry.champion(NAME).version == 2


def test_a_refused_version_stays_challenger_for_good(project, registry):
    add_version(project, "run-1", 4)
    refused = add_version(project, "run-2", 60, answer={"answer": "refused", "comment": "too\nearly"})
    assert refused.version.aliases == [CHALLENGER] and registry.champion(NAME).version == 1
    tags = refused.version.tags
    assert (tags[GATE_TAG], tags[APPROVAL_TAG], tags[COMMENT_TAG]) == ("passed", "refused", "too\nearly")
    assert tags[REASONS_TAG].startswith("refused: too early; better than the champion")
    shown = registry.client.get_model_version(NAME, "2").description
    assert shown.startswith("**challenger**\n\n- refused: too early\n- better than")
    assert not refused.verdict["promoted"] and refused.verdict["approval"]["comment"] == "too\nearly"
    with pytest.raises(
        RegistryError, match=r"models:/panda-count/2 was refused: too early; better than .*--despite_gate"
    ):
        promotion.promote(registry, f"{NAME}/2", despite_gate=False)
    assert promotion.promote(registry, f"{NAME}/2", despite_gate=True)[0].version == 2


def test_a_version_nobody_answered_for_is_promoted_by_hand(project, registry):
    add_version(project, "run-1", 4)
    waiting = add_version(project, "run-2", 60, answer={"answer": "no answer", "comment": "in 24 h"})
    assert waiting.version.aliases == [CHALLENGER] and waiting.version.tags[APPROVAL_TAG] == "no answer"
    promotion.promote(registry, f"{NAME}/2", despite_gate=False)
    assert registry.champion(NAME).version == 2


def test_an_approved_version_becomes_champion_unless_the_champion_changed(project, registry):
    yes = {"answer": "approved", "comment": "well done"}
    first = add_version(project, "run-1", 4, answer=yes)
    assert first.version.aliases == [CHAMPION] and first.version.tags[COMMENT_TAG] == "well done"
    assert first.version.tags[REASONS_TAG].startswith("approved: well done; the first version")
    second = add_version(project, "run-2", 60)
    late = {**second.verdict, "champion": None}
    assert not settle(registry, registry.resolve(f"{NAME}/1"), late, yes)
    assert registry.resolve(f"{NAME}/1").tags[COMMENT_TAG] == "well done" and registry.champion(NAME).version == 2
    assert "the champion has changed" in late["reasons"][1]


def test_settling_that_was_killed_is_done_again(project, registry, monkeypatch):
    """The tag `panda.gate` is the last thing written: who finds it need not look at the aliases."""
    add_version(project, "run-1", 4)
    monkeypatch.setattr(promotion, "make_champion", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        add_version(project, "run-2", 60)
    assert GATE_TAG not in registry.resolve(f"{NAME}/2").tags


def test_the_question_shows_what_is_needed_to_decide(project):
    add_version(project, "run-1", 4)
    verdict = add_version(project, "run-2", 60).verdict
    losses = {"before": {"all": 4.123456}, "after": {"all": 3.987654}}
    text = approval.question(verdict, losses, {"MLflow run": "http://x/y", "run": "sqlite:///a"})
    whole, *slices = verdict["slices"]
    worst = min(slices, key=lambda row: row["gain"])
    assert f"- gain: {whole['gain']:+.4f} [{whole['low']:+.4f}, {whole['high']:+.4f}] nats per target token" in text
    assert f"- loss on them: {whole['loss']:.4f}, champion {whole['reference_loss']:.4f}" in text
    assert f"- worst slice: {worst['slice']}, gain {worst['gain']:+.4f}" in text
    assert "- held-out loss before and after training: all 4.1235 -> 3.9877" in text
    assert "- MLflow run: <http://x/y>" in text and "- run: `sqlite:///a`" in text


def test_versions_that_were_trained_on_a_record_and_in_which_steps(project, registry):
    short = add_version(project, "run-1", 3)
    long = add_version(project, "run-2", 40)
    child = add_version(project, "run-3", 1, model_dir=long.run_dir / "model")
    assert child.version.tags[PARENT_TAG] == long.version.uri
    plan_dir = read_config(short.run_dir / "config.yaml").plan_dir
    row = int(rows_at(plan_dir, 5)[0])
    place = f"{project.data_dir / 'a.jsonl'}:{open_plan(plan_dir, 'train').origins(row)[0][1]}"
    (found,) = lineage.find_record(place, registry, project.cache_dir)
    seen = {one.uri: one for one in lineage.versions_trained_on(registry, found.hash, project.cache_dir)}
    assert not seen[short.version.uri].trained and seen[short.version.uri].certain
    assert seen[long.version.uri].steps == [step + 1 for step in range(40) if row in rows_at(plan_dir, step)]
    own = seen[child.version.uri]
    assert own.trained and own.through == long.version.uri
    facts = lineage.describe(registry, child.version, project.cache_dir)
    assert facts["ancestors"] == [long.version.uri]
    assert [(Path(file["file"]).name, file["now"]) for file in facts["corpus"]["files"]] == [("a.jsonl", "unchanged")]
    with open(project.data_dir / "a.jsonl", "a") as file:
        file.write("\n")
    assert lineage.describe(registry, long.version, project.cache_dir)["corpus"]["files"][0]["now"] == "changed"


def test_a_version_whose_plan_is_gone_is_not_called_innocent(project, registry):
    first = add_version(project, "run-1", 3)
    (found,) = lineage.find_record(f"{project.data_dir / 'a.jsonl'}:1", registry, project.cache_dir)
    (project.cache_dir / "plans").rename(project.root / "elsewhere")
    (seen,) = lineage.versions_trained_on(registry, found.hash, project.cache_dir)
    assert not seen.certain and "panda reproduce" in seen.note and seen.uri == first.version.uri


def rows_at(plan_dir: Path, step: int) -> np.ndarray:
    """Rows that a step (from 0) trains on."""
    num_rows = open_plan(plan_dir, "train").num_rows
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_rows, ROWS_PER_STEP))
    return rows_of_step(num_rows, ROWS_PER_STEP, 42, epoch, step_in_epoch)


def test_texts_are_found_or_refused(project, registry):
    project.plan()
    (found,) = lineage.find_text("what follows seven", project.cache_dir)[:1]
    assert "what follows seven" in found.text
    with pytest.raises(PandaError, match="no prepared record contains"):
        lineage.find_text("nobody wrote this", project.cache_dir)
    with pytest.raises(PandaError, match="records contain"):
        lineage.find_text("what follows", project.cache_dir)
    tombstones.append(Path(project.settings()["tombstones"]), [{"hash": found.hash}])
    assert project.plan().report["dropped"]["taken_down"] == 1


@pytest.mark.slow
def test_through_a_server_the_champion_is_fetched_once(project):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    with server(project.output_dir, port):
        first = add_version(project, "run-1", 4, uri=uri)
        second = add_version(project, "run-2", 40, uri=uri)
        registry = Registry(uri)
        assert first.version.aliases == [CHAMPION] and second.verdict["champion"] == f"models:/{NAME}/1"
        assert registry.champion(NAME).version == 2
        fetched = registry.files(first.version, project.cache_dir)
        assert fetched.parent == project.cache_dir / "registry" and (fetched / "model.safetensors").is_file()
        assert second.verdict["reasons"][0].startswith(f"better than the champion models:/{NAME}/1")
        assert lineage.parent_of(registry, str(fetched)) == first.version.uri
        grown = with_tokens(fetched, ["<tool>"], project.cache_dir)
        assert grown != fetched and lineage.parent_of(registry, str(grown)) == first.version.uri
        assert promotion.rollback(registry, NAME)[0].version == 1
