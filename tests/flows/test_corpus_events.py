"""Which news of a changed corpus nobody has answered; that real events start one real run is in `test_unattended`."""

from datetime import timedelta
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.events.schemas.events import ReceivedEvent
from prefect.states import AwaitingConcurrencySlot, Cancelled, Completed, Running, Scheduled
from prefect.types._datetime import now

from flows.watch.corpus_events import first_unanswered

NOON = now("UTC")


def event(minute: float) -> ReceivedEvent:
    resource = {"prefect.resource.id": "panda.corpus.main"}
    return ReceivedEvent(event="panda.corpus.updated", resource=resource, received=NOON + timedelta(minutes=minute))


def run(began: float | None, state=None) -> FlowRun:
    start_time = None if began is None else NOON + timedelta(minutes=began)
    return FlowRun(id=uuid4(), flow_id=uuid4(), start_time=start_time, state=state or Completed())


ONE, TWO = event(1), event(2)
CASES = {
    "no run": ([], ONE),
    "a run before it": ([run(0)], ONE),
    "a run after it": ([run(1.5)], TWO),
    "a run after both": ([run(0), run(3)], None),
    "one that is at work since before": ([run(0, Running())], ONE),
    "one that waits for its turn": ([run(None, AwaitingConcurrencySlot())], None),
    "one that is about to begin": ([run(0), run(None, Scheduled())], None),
    "one that was cancelled before it began": ([run(None, Cancelled())], ONE),
    "one that was cancelled while it ran": ([run(3, Cancelled())], ONE),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_that_no_run_has_answered(case):
    runs, expected = CASES[case]
    assert first_unanswered([ONE, TWO], runs) == expected


def test_nothing_said_nothing_to_answer():
    assert first_unanswered([], [run(0)]) is None
