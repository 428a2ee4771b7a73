"""What becomes of crashed runs, on a real server; whole runs that crash and go on are in `test_unattended`."""

import os
import subprocess
import sys
import time
from datetime import timedelta

import httpx
import pytest
from prefect import flow
from prefect.client.schemas.objects import StateType
from prefect.events import Event
from prefect.settings import temporary_settings
from prefect.states import Cancelling, Crashed, Running
from prefect.types._datetime import now

from flows.panda_evaluate import panda_evaluate
from flows.panda_prepare import panda_prepare
from flows.panda_train import panda_train
from flows.stack.services import HEARTBEAT
from flows.watch import restarts
from flows.watch.restarts import RESTARTING, RUN_ID, being_cancelled, end_cancelled, heal, is_heard_of
from tests.support.stack import wait_for

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


def answered(status: int, request: httpx.Request) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError(f"{status}", request=request, response=httpx.Response(status))


@pytest.mark.parametrize(
    ("error", "of_prefect", "kind"),
    [
        (lambda asked: httpx.ReadTimeout("", request=asked), True, StateType.CRASHED),
        (lambda asked: httpx.ConnectError("refused", request=asked), True, StateType.CRASHED),
        (lambda asked: answered(500, asked), True, StateType.CRASHED),
        (lambda asked: answered(404, asked), True, StateType.FAILED),
        (lambda asked: httpx.ReadTimeout("", request=asked), False, StateType.FAILED),
        (lambda _: httpx.ReadTimeout(""), True, StateType.FAILED),
        (lambda _: RuntimeError("of something else"), True, StateType.FAILED),
    ],
)
def test_a_server_that_is_away_for_too_long_is_a_crash(monkeypatch, prefect_server, error, of_prefect, kind):
    url = prefect_server.url if of_prefect else "https://models.example"

    def ask(_):
        raise error(httpx.Request("POST", f"{url}/task_runs/"))

    for one, name in ((panda_train, "configure"), (panda_prepare, "configure"), (panda_evaluate, "read")):
        monkeypatch.setattr(sys.modules[one.fn.__module__], name, ask)
        with temporary_settings(prefect_server.settings):
            state = one(return_state=True)
        assert state.type is kind
        assert ("went away" in state.message) is (kind is StateType.CRASHED)


def test_what_a_person_has_cancelled_is_not_started_again(prefect_client):
    """Prefect kills it when it has not ended in half a minute, and calls that a crash."""
    run = crashed(prefect_client, Cancelling())
    heal(prefect_client, run)
    state = prefect_client.read_flow_run(run.id).state
    assert state.type is StateType.CANCELLED
    assert state.message == "cancelled; it did not end by itself in time: Process exited with status code: -9."


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
print("up", flush=True)
while True:
    time.sleep(1)
"""


class TestCancellationThatNobodyHeard:
    @pytest.fixture
    def cancelling(self, prefect_client):
        """A run that is being cancelled."""
        deployment = prefect_client.create_deployment(prefect_client.create_flow(ours), "unheard")
        run = prefect_client.create_flow_run_from_deployment(deployment)
        for state in (Running(), Cancelling()):
            prefect_client.set_flow_run_state(run.id, state, force=True)
        return prefect_client.read_flow_run(run.id)

    @pytest.fixture
    def engine(self, cancelling):
        """A process that is started as that of the run, and does not end by itself."""
        command = [sys.executable, "-c", STUBBORN, "prefect.engine"]
        environment = os.environ | {RUN_ID: str(cancelling.id)}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "up\n"
            yield process
            process.kill()

    def test_it_is_left_to_the_worker_at_first(self, prefect_client, cancelling, engine):
        assert cancelling.id in {run.id for run in being_cancelled(prefect_client)}
        asked = set()
        end_cancelled(prefect_client, cancelling, asked)
        assert not asked and engine.poll() is None

    def test_then_it_is_asked_once_and_killed_in_the_end(self, prefect_client, cancelling, engine, monkeypatch):
        asked = set()
        monkeypatch.setattr(restarts, "UNHEARD", timedelta(seconds=0.001))
        end_cancelled(prefect_client, cancelling, asked)
        assert engine.stdout.readline() == "asked\n" and asked == {cancelling.id}
        monkeypatch.setattr(restarts, "UNHEARD", timedelta(hours=1))
        end_cancelled(prefect_client, cancelling, asked)
        assert engine.poll() is None
        monkeypatch.setattr(restarts, "UNHEARD", timedelta(seconds=0.001))
        end_cancelled(prefect_client, cancelling, asked)
        assert engine.wait(10) == -9

    def test_what_nobody_works_on_is_cancelled(self, prefect_client, cancelling, monkeypatch):
        """It was cancelled while it waited for its restart: there is no process that could say so."""
        monkeypatch.setattr(restarts, "UNHEARD", timedelta(seconds=0.001))
        end_cancelled(prefect_client, cancelling, set())
        assert prefect_client.read_flow_run(cancelling.id).state.type is StateType.CANCELLED

    def test_what_lives_on_another_machine_is_not(self, prefect_client, cancelling, monkeypatch):
        time.sleep(1)  # the heart beats clearly later than somebody cancels
        beat = Event(event=HEARTBEAT, resource={"prefect.resource.id": f"prefect.flow-run.{cancelling.id}"})
        prefect_client._client.post("/events", json=[beat.model_dump(mode="json")]).raise_for_status()
        wait_for(lambda: is_heard_of(prefect_client, cancelling), 20, "the heartbeat")
        monkeypatch.setattr(restarts, "UNHEARD", now("UTC") - cancelling.state.timestamp)
        end_cancelled(prefect_client, cancelling, set())
        assert prefect_client.read_flow_run(cancelling.id).state.type is StateType.CANCELLING
