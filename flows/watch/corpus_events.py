"""A run when somebody says that a corpus has changed: events that come together are answered by one run.

In: events ``panda.corpus.updated`` of a resource ``panda.corpus.NAME`` at the Prefect server; who may start a run may
emit them (`prefect event emit panda.corpus.updated --resource-id panda.corpus.weekly`). Out: runs of
`panda-train/default`, with the settings of its schedule NAME if it has one, else its own. An event is answered when
a run that its resource has started began after it, or has not begun yet: it will see all the data there is. Nothing is
remembered here, so a watch that was killed forgets nothing and answers nothing twice. Cost: a request a look, three
where there is an event.
"""

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.filters import EventFilter
from prefect.events.schemas.events import ReceivedEvent
from prefect.exceptions import ObjectNotFound
from prefect.types._datetime import now

from flows.parts.policy import CORPUS_EVENT_TAG

CORPUS_UPDATED = "panda.corpus.updated"
CORPUS = "panda.corpus."
DEPLOYMENT = "panda-train/default"
TOGETHER = timedelta(seconds=6)  # after the first one; a feed of several files says so several times
REMEMBERED = timedelta(days=1)  # older ones are answered by the schedule, if there is one
PAGE = 50

logger = logging.getLogger(__name__)


def look(client: SyncPrefectClient) -> None:
    """Start what the events of the last day ask for and nobody has started."""
    by_resource = updates(client)
    if not by_resource:
        return
    try:
        deployment = client.read_deployment_by_name(DEPLOYMENT)
    except ObjectNotFound:
        logger.warning("%s of %s, and there is no deployment %s", CORPUS_UPDATED, ", ".join(by_resource), DEPLOYMENT)
        return
    for resource, events in by_resource.items():
        first = first_unanswered(events, runs_of(client, deployment.id, resource))
        if first and now("UTC") - first.received >= TOGETHER:
            run = client.create_flow_run_from_deployment(
                deployment.id,
                parameters=settings_of(deployment, resource),
                tags=[CORPUS_EVENT_TAG, resource],
                idempotency_key=f"{CORPUS_UPDATED} {first.id}",
            )
            logger.info("%s of %s: run %s", CORPUS_UPDATED, resource, run.name)


def updates(client: SyncPrefectClient) -> dict[str, list[ReceivedEvent]]:
    """Resource -> its newest events, the oldest of them first."""
    wanted = EventFilter.model_validate({
        "occurred": {"since": now("UTC") - REMEMBERED},
        "event": {"name": [CORPUS_UPDATED]},
        "resource": {"id_prefix": [CORPUS]},
    })  # fmt: skip
    found: dict[str, list[ReceivedEvent]] = {}
    for event in sorted(client.read_events(wanted, limit=PAGE).events, key=lambda event: event.received):
        found.setdefault(event.resource.id, []).append(event)
    return found


def runs_of(client: SyncPrefectClient, deployment_id: UUID, resource: str) -> list[FlowRun]:
    """The newest runs that events of a resource have started."""
    wanted = FlowRunFilter.model_validate({
        "deployment_id": {"any_": [deployment_id]},
        "tags": {"all_": [CORPUS_EVENT_TAG, resource]},
    })  # fmt: skip
    return client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=PAGE)


def first_unanswered(events: Sequence[ReceivedEvent], runs: Sequence[FlowRun]) -> ReceivedEvent | None:
    """The oldest event that no run of its resource has seen the data of."""
    living = [run for run in runs if run.state and not run.state.is_cancelled()]
    if any(run.start_time is None and not run.state.is_final() for run in living if run.state):
        return None
    last = max((run.start_time for run in living if run.start_time), default=None)
    return next((event for event in events if last is None or event.received > last), None)


def settings_of(deployment: DeploymentResponse, resource: str) -> dict[str, Any]:
    """The parameters of the schedule that a resource is named after."""
    name = resource.removeprefix(CORPUS)
    return next((one.parameters for one in deployment.schedules if one.slug == name), {})
