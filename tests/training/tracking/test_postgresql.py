"""The registry in PostgreSQL, named directly: the same promises as with SQLite, and the password is nowhere.

A server of its own is started on a free port. Needs PostgreSQL (Debian: `apt-get install postgresql`) and the extra
`postgresql`, so these tests run only when asked for: `pytest -m extra`.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cli.main import main
from tests.support.corpora import NAME, Project, add_version
from tests.support.postgresql import PASSWORD, Server, away, running_server
from tests.support.tiny_models import save_full_model
from tests.training.registry.test_register import TAGS, tracked_run
from training.errors import MlflowAway
from training.launch.processes import free_port
from training.registry import promotion
from training.registry import register as registry
from training.registry.register import register
from training.registry.versions import CHAMPION, Registry
from training.tracking.sync import connect

pytestmark = pytest.mark.extra


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        connect(server.uri()).search_experiments()  # makes MLflow's tables
        yield server


def test_champion_and_rollback_and_no_password_anywhere(server, tmp_path, caplog, capsys):
    project = Project(tmp_path, tmp_path / "outputs")
    project.output_dir.mkdir()
    first = add_version(project, "run-1", 4, uri=server.uri())
    better = add_version(project, "run-2", 60, uri=server.uri())
    assert first.version.aliases == [CHAMPION] == better.version.aliases and better.verdict["promoted"]
    models = Registry(server.uri())
    assert models.champion(NAME).version == 2 and promotion.rollback(models, NAME)[0].version == 1
    assert (project.output_dir / "mlartifacts").is_dir() and not Path("mlruns").exists()
    assert main(["models", "--mlflow_tracking_uri", server.uri()]) == 0
    assert f"{NAME}/2" in capsys.readouterr().out
    for path in (project.output_dir / "mlartifacts").rglob("*"):
        assert path.suffix == ".safetensors" or not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path
    assert PASSWORD not in caplog.text
    run = models.client.get_run(better.version.run_id)
    assert run.info.status == "FINISHED" and PASSWORD not in str(run.to_dictionary())


def test_a_database_that_is_away_is_waited_for(server, tmp_path, monkeypatch, capsys, caplog):
    run_dir = tmp_path / "outputs" / "run-1"
    run_dir.mkdir(parents=True)
    save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir, server.uri())
    with away(server):
        monkeypatch.setattr(registry, "RETRY_SECONDS", (0,))
        monkeypatch.setattr(registry, "PATIENT_SECONDS", ())
        with pytest.raises(MlflowAway, match="MLflow does not answer"):
            register(run_dir, tracked.run_id, "panda-tiny", TAGS, server.uri())
    started = time.monotonic()
    absent = server.uri().replace(str(server.port), str(free_port()))
    assert main(["models", "--mlflow_tracking_uri", absent]) == 2 and time.monotonic() - started < 30
    said = capsys.readouterr().err + caplog.text
    assert "does not answer" in said
    assert PASSWORD not in said
    assert "Traceback" not in said
    server.kill()
    monkeypatch.setattr(registry, "RETRY_SECONDS", (1, 2, 5, 10))
    threading.Timer(2, server.start).start()
    version = register(run_dir, tracked.run_id, "panda-tiny", TAGS, server.uri())
    assert version == register(run_dir, tracked.run_id, "panda-tiny", TAGS, server.uri()) and version.version == 1
