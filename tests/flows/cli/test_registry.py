"""The verbs about registered models as a user types them, for a chosen line of a real corpus."""

import json
from pathlib import Path

import pytest

from data_prep.plan.reader import open_plan
from data_prep.store import hash_file
from flows.cli.main import main
from tests.support.corpora import NAME, Project, add_version
from tests.support.mlflow_fixtures import empty_database, output_dir
from tests.support.real_corpora import REAL
from training.launch.run_config import read_config
from training.registry.versions import Registry

__all__ = ["empty_database", "output_dir"]

with_real_corpora = pytest.mark.skipif(not REAL.is_dir(), reason="no real corpora here (PANDA_REAL_CORPORA)")


@pytest.fixture
def project(tmp_path, output_dir) -> Project:
    """A project whose corpus is the real one."""
    corpus = REAL / "instruction_tuning"
    return Project(tmp_path, output_dir, corpus, overflow="truncate_prompt_left", gate_records=20, max_seq_length=256)


@pytest.fixture
def panda(project, capsys):
    """Run a verb with ``--json``; returns its object. Asserts that it went well."""

    def run(*argv: str) -> dict:
        places = ["--output_dir", str(project.output_dir), "--cache_dir", str(project.cache_dir)]
        assert main([*argv, *places, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@with_real_corpora
def test_lineage_and_takedown_of_a_chosen_line(project, panda):
    first = add_version(project, "run-1", 3)
    plan = open_plan(read_config(first.run_dir / "config.yaml").plan_dir, "train")
    file, line = plan.origins(0)[0]
    place = f"{file}:{line}"

    facts = panda("lineage", f"models:/{NAME}@champion")
    assert facts["version"] == f"models:/{NAME}/1" and facts["plan"]["path"] == str(plan.path)
    hashes = {Path(one["file"]).name: (one["xxh3"], one["now"]) for one in facts["corpus"]["files"]}
    corpus = REAL / "instruction_tuning"
    assert hashes == {path.name: (hash_file(path), "unchanged") for path in corpus.glob("*.json")}

    (record,) = panda("why", place, "--models")["records"]
    (seen,) = record["versions"]
    assert place in record["places"] and seen["uri"] == f"models:/{NAME}/1" and seen["certain"]

    took = panda("takedown", place, "--note", "asked for", "--tombstones", project.settings()["tombstones"])
    assert took["new"] == 1 and took["versions"] == ([seen["uri"]] if seen["trained"] else [])
    version = Registry(f"sqlite:///{project.output_dir / 'mlflow.db'}").resolve(f"{NAME}/1")
    assert version.taken_down == ([record["hash"]] if seen["trained"] else [])
    report = project.plan().report
    assert report["dropped"]["taken_down"] == len(record["places"])
    again = panda("takedown", place, "--tombstones", project.settings()["tombstones"])
    assert again["new"] == 0

    second = add_version(project, "run-2", 3)
    (record,) = panda("why", place, "--models")["records"]
    by_uri = {one["uri"]: one for one in record["versions"]}
    assert not by_uri[second.version.uri]["trained"] and by_uri[second.version.uri]["certain"]


@with_real_corpora
def test_a_line_is_trained_in_the_steps_that_are_told(project, panda):
    """Of a line of the first step: its steps, the tag with them, and the count in `panda models`."""
    from data_prep.plan.order import rows_of_step
    from tests.support.corpora import ROWS_PER_STEP

    first = add_version(project, "run-1", 2)
    plan = open_plan(read_config(first.run_dir / "config.yaml").plan_dir, "train")
    row = int(rows_of_step(plan.num_rows, ROWS_PER_STEP, 42, 0, 1)[0])
    file, line = plan.origins(row)[0]
    (record,) = panda("why", f"{file}:{line}", "--models")["records"]
    assert record["versions"][0]["steps"] == [2]
    assert panda("takedown", f"{file}:{line}", "--tombstones", project.settings()["tombstones"])["versions"]
    (listed,) = panda("models", NAME)["versions"]
    assert listed["taken_down"] == [record["hash"]] and listed["aliases"] == ["champion"]
    assert panda("models")["versions"] == [listed]


@with_real_corpora
def test_several_records_need_a_decision(project, capsys):
    project.plan()
    places = ["--output_dir", str(project.output_dir), "--cache_dir", str(project.cache_dir)]
    places += ["--tombstones", project.settings()["tombstones"]]
    assert main(["takedown", "--text", "photosynthesis", *places]) == 2
    assert "records are meant; to take down all of them: --all" in capsys.readouterr().err
    assert not Path(project.settings()["tombstones"]).exists()
    assert main(["takedown", "--text", "photosynthesis", "--all", *places]) == 0
    assert "Versions tagged: 0" in capsys.readouterr().out
    assert main(["takedown", *places]) == 2
    assert "give FILE:LINE first, or --text TEXT" in capsys.readouterr().err
    assert main(["promote", *places[:4]]) == 2
    assert "usage: panda promote VERSION" in capsys.readouterr().err


def test_no_registry_is_said_and_none_is_made(tmp_path, capsys):
    assert main(["models", "--output_dir", str(tmp_path)]) == 2
    assert "there is no registry at sqlite:///" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_server_that_is_down_is_said_in_one_line(capsys):
    assert main(["models", "--mlflow_tracking_uri", "http://me:secret@127.0.0.1:9"]) == 2
    said = capsys.readouterr().err
    assert "does not answer" in said and "secret" not in said and "Traceback" not in said
