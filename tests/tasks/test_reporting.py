"""Where people are sent to look at a run: to the server that shows its database, and to no other."""

import pytest

from tasks.reporting import MLFLOW_DATABASE, MLFLOW_UI, addresses
from tests.support.mlflow_fixtures import empty_database, output_dir, run_dir
from training.tracking import run_record
from training.tracking.run import TrackedRun
from training.tracking.sync import connect

__all__ = ["empty_database", "output_dir", "run_dir"]
SHOWN = "http://127.0.0.1:5000"


@pytest.fixture
def tracked(output_dir, run_dir) -> TrackedRun:
    """A run in the database of an output directory."""
    uri = f"sqlite:///{output_dir / 'mlflow.db'}"
    run_id = connect(uri).create_run("0").info.run_id
    run_record.write(run_dir, run_record.RunRecord("panda", "run-1", uri, {}, {}, [], run_id=run_id))
    return TrackedRun(run_dir, uri)


@pytest.mark.parametrize("is_shown", [True, False])
def test_links_lead_to_the_server_of_this_database(tracked, monkeypatch, is_shown):
    """`panda up` shows that of its own output directory; the run may have written to another one."""
    monkeypatch.setenv(MLFLOW_UI, SHOWN)
    monkeypatch.setenv(MLFLOW_DATABASE, tracked.uri if is_shown else "sqlite:////elsewhere/mlflow.db")
    found = addresses(tracked, "models:/panda/3")
    if is_shown:
        assert found["MLflow run"].startswith(f"{SHOWN}/#/experiments/0/runs/{tracked.run_id}")
        assert found["version"].startswith(f"{SHOWN}/#/models/panda/versions/3")
    else:
        assert found == {"MLflow run": f"{tracked.run_id} in {tracked.uri}"}
