"""Runs of our flows on a real Prefect server: which may go, and that their artifacts go with them."""

import time

import pytest
from prefect import flow
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Crashed, Running

from flows.retention.in_prefect import flow_runs, remove

pytestmark = pytest.mark.usefixtures("use_prefect_server")


@flow(name="panda-evaluate")
def ours() -> None:
    """It has the name of one of our flows, and is never called."""


@flow
def somebody_elses() -> None:
    """Never called either."""


def test_what_has_ended_may_go_with_its_artifacts(prefect_client):
    ended, crashed, runs, other = (
        prefect_client.create_flow_run(function, state=state)
        for function, state in (
            (ours, Completed()),
            (ours, Crashed()),
            (ours, Running()),
            (somebody_elses, Completed()),
        )
    )
    for run in (ended, runs):
        prefect_client.create_artifact(ArtifactCreate(key="report", data="text", flow_run_id=run.id))
    found = flow_runs()
    items = {item.key.name: item for item in found.items}
    assert {str(one.id) for one in (ended, crashed, runs)} <= items.keys() and str(other.id) not in items
    assert not items[str(ended.id)].keep and abs(items[str(ended.id)].made - time.time()) < 600
    assert items[str(runs.id)].keep == "has not ended"
    assert {str(crashed.id), str(runs.id)} <= found.open and str(ended.id) not in found.open

    for _ in range(2):
        remove(prefect_client, str(ended.id))
    with pytest.raises(ObjectNotFound):
        prefect_client.read_flow_run(ended.id)
    left = ArtifactFilter.model_validate({"flow_run_id": {"any_": [ended.id, runs.id]}})
    assert [one.flow_run_id for one in prefect_client.read_artifacts(artifact_filter=left)] == [runs.id]
