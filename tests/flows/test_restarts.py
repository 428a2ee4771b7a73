"""What becomes of crashed runs, on a real server; whole runs that crash and go on are in `test_unattended`."""

import pytest
from prefect import flow
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelling, Crashed, Running

from flows.watch.restarts import RESTARTING, heal

pytestmark = pytest.mark.usefixtures("use_prefect_server")


@flow(name="panda-evaluate")
def ours(overrides: list[str]) -> None:
    """It has the name of one of our flows, and is never called."""


def crashed(client, *before):
    """A run with these states behind it."""
    deployment = client.create_deployment(client.create_flow(ours), "restarts")
    run = client.create_flow_run_from_deployment(deployment, parameters={"overrides": ["max_restarts=2"]})
    for state in (Running(), *before, Crashed(message="Process exited with status code: -9.")):
        client.set_flow_run_state(run.id, state, force=True)
    return client.read_flow_run(run.id)


def test_a_crash_is_no_end(prefect_client):
    run = crashed(prefect_client)
    heal(prefect_client, run)
    assert prefect_client.read_flow_run(run.id).state.name == RESTARTING


def test_what_a_person_has_cancelled_is_not_started_again(prefect_client):
    """Prefect kills it when it has not ended in half a minute, and calls that a crash."""
    run = crashed(prefect_client, Cancelling())
    heal(prefect_client, run)
    state = prefect_client.read_flow_run(run.id).state
    assert state.type is StateType.CANCELLED
    assert state.message == "cancelled; it did not end by itself in time: Process exited with status code: -9."
