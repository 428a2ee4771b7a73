"""`panda gc` on a real MLflow database, real run directories and real prepared data, all of them tiny."""

import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from data_prep import in_use, store
from flows.cli.main import main
from flows.retention import remove
from tests.support.mlflow_fixtures import empty_database, output_dir
from tests.support.registered import NAME, MadeProject
from training.launch.processes import free_port
from training.registry import promotion
from training.registry.versions import RegistryError

__all__ = ["empty_database", "output_dir"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, empty_database) -> MadeProject:
    folder = tmp_path_factory.mktemp("made")
    (folder / "outputs").mkdir()
    shutil.copyfile(empty_database, folder / "outputs" / "mlflow.db")
    return MadeProject(folder / "outputs", folder / "cache")


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    """The project in its place, after the test again as it was made; no Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    root, kept, database = made.output_dir.parent, tmp_path / "as-made", Path("outputs", "mlflow.db")
    shutil.copytree(root, kept, copy_function=os.link, ignore=shutil.ignore_patterns("mlflow.db*"))
    copy_database(root / database, kept / database)
    yield made
    for path in [*root.glob("outputs/*"), *root.glob("cache/*")]:
        if path.is_dir():
            shutil.rmtree(path)
    shutil.copytree(kept, root, copy_function=link, ignore=shutil.ignore_patterns("mlflow.db*"), dirs_exist_ok=True)
    copy_database(kept / database, root / database)


def copy_database(source: Path, target: Path) -> None:
    """Into the file that is there: MLflow's connections stay open."""
    with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
        one.backup(other)


def link(source: str, target: str) -> None:
    if not os.path.exists(target):
        os.link(source, target)


def gc(project: MadeProject, capsys, *argv: str) -> dict:
    """With the shortest memory there is."""
    places = ["--output_dir", str(project.output_dir), "--cache_dir", str(project.cache_dir)]
    assert main(["gc", *places, "--keep_versions", "1", "--keep_days", "0", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def names(answer: dict, kind: str) -> set[str]:
    found = answer.get("freed", answer.get("would_free"))
    return {Path(one["name"]).name for one in found if one["kind"] == kind}


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.name.startswith(("mlflow.db", ".in_use"))}


def test_shows_first_and_frees_then(project, capsys):
    assert gc(project, capsys, "--keep_days", "1")["would_free"] == [], "the young stay"
    before = everything(project.output_dir.parent)
    shown = gc(project, capsys)
    assert everything(project.output_dir.parent) == before and project.versions() == list(range(1, 8))

    freed = gc(project, capsys, "--yes")
    assert [one["name"] for one in freed["freed"]] == [one["name"] for one in shown["would_free"]]
    assert freed["left_alone"] == [
        "Prefect's runs, and unfinished runs of its deployments: no server answers (panda up)"
    ]
    assert project.versions() == [3, 4, 5, 6, 7], "a line of champions stays for its lineage"
    assert project.weights() == [4, 5, 6, 7], (
        "the challenger, the champion, where rollback leads, what these began with"
    )
    assert project.runs() == [4, 5, 6, 7, 8] and names(freed, "run") == {"run-001", "run-002", "run-003"}
    assert [path.parent.name for path in project.output_dir.glob("run-*/checkpoints")] == ["run-008"]
    assert len(names(freed, "plan")) == 2 and len(names(freed, "tokens")) == 1, "2 and 3 share their tokens"
    assert len(names(freed, "mlflow run")) == 2
    project.check_whole()
    assert gc(project, capsys, "--yes")["freed"] == []
    assert not [path for path in everything(project.output_dir.parent) if ".freed" in path.name]


def test_what_has_lost_its_weights_is_no_champion_any_more(project, capsys):
    gc(project, capsys, "--yes")
    before, _ = promotion.rollback(project.registry, NAME)
    assert before.version == 5
    with pytest.raises(RegistryError, match=rf"models:/{NAME}/3: its weights were freed by panda gc \("):
        promotion.promote(project.registry, f"{NAME}/3", despite_gate=True)


PER_TRY = 9


class Stopped(BaseException):
    """Nobody catches it."""


def test_stopped_anywhere_it_leaves_what_is_whole_and_goes_on(project, capsys, monkeypatch):
    """Again and again after a few deletions, each of which is killed itself: directories are renamed, not deleted."""
    shown = gc(project, capsys)["would_free"]
    real, left = remove.Sweep.remove, [0]

    def some(sweep, item):
        if not left[0]:
            raise Stopped
        left[0] -= 1
        return real(sweep, item)

    monkeypatch.setattr(remove.Sweep, "remove", some)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    done = 0
    while done < len(shown):
        left[0] = PER_TRY
        with pytest.raises(Stopped) if done + PER_TRY < len(shown) else contextlib.nullcontext():
            gc(project, capsys, "--yes")
        done += PER_TRY
        project.check_whole()
    monkeypatch.undo()
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    assert gc(project, capsys, "--yes")["freed"] == []
    assert (project.versions(), project.runs()) == ([3, 4, 5, 6, 7], [4, 5, 6, 7, 8])
    assert project.weights() == [4, 5, 6, 7]
    assert not [path for path in everything(project.output_dir.parent) if ".freed" in path.name]


def test_a_run_that_is_taken_again_and_a_cache_in_use_are_left_alone(project, capsys):
    with open(project.output_dir / "run-002" / ".lock", "w") as lock, in_use.using(project.cache_dir):
        fcntl.flock(lock, fcntl.LOCK_EX)
        freed = gc(project, capsys, "--yes")
    assert f"{project.cache_dir}: a preparation is at work there" in freed["left_alone"]
    assert not names(freed, "plan") and project.runs() == [2, 4, 5, 6, 7, 8]


def test_what_another_output_directory_needs_of_the_cache_stays(project, capsys, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    first = sorted(names(gc(project, capsys), "plan"))[0]
    config = {"paths": {"plan_dir": str(project.cache_dir / "plans" / first)}}
    (other / "run-1").mkdir()
    (other / "run-1" / "config.yaml").write_text(json.dumps(config))
    in_use.note_user(project.cache_dir, other)
    assert names(gc(project, capsys, "--yes"), "plan") and (project.cache_dir / "plans" / first).is_dir()


def test_weights_that_were_made_for_a_run_stay_as_long_as_it_does(project, capsys):
    """A base with its delta, or with new tokens."""
    made = {}
    for number in (1, 6):
        config = project.output_dir / f"run-{number:03}" / "config.yaml"
        base = store.build(project.cache_dir / "models", f"{number:032}", lambda folder: {"base": "elsewhere"}).path
        made[number], content = base, yaml.safe_load(config.read_text())
        content["paths"]["model_dir"] = str(base)
        config.write_text(yaml.safe_dump(content))
    assert names(gc(project, capsys, "--yes"), "made base") == {made[1].name}
    assert made[6].is_dir() and not made[1].exists()


def test_a_run_that_another_mlflow_knows_stays(project, capsys):
    """Its versions are there, and nobody has looked: MLFLOW_TRACKING_URI may be set for the worker alone."""
    path = project.output_dir / "run-001" / "tracking.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_id": "0" * 32, "uri": "http://mlflow:5000"}))
    freed = gc(project, capsys, "--yes")
    assert names(freed, "run") == {"run-002", "run-003"}
    why = [one["why"] for one in freed["kept"] if one["name"] == str(project.output_dir / "run-001")]
    assert why == ["known to another MLflow (http://mlflow:5000)"]
