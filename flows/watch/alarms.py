"""What does not happen is told: runs that are late, schedules without success, a server that does not answer.

In: a client of the Prefect server. Out: messages through the block that `notify` of a deployment's schedules names;
each thing is told once, also by a watch that was started again (`told` is kept in a file). What runs themselves can
tell, they do (`flows.parts.notify`). Blocks are kept in memory, since a server that is away cannot be asked for them.
Cost: some requests a minute.
"""

import json
import logging
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from prefect.blocks.core import Block
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.types._datetime import now

from configs.settings import UnattendedSettings
from data_prep.store import write_atomically
from flows.parts.notify import without_paths
from flows.watch.restarts import FLOWS, unattended

NOT_BEGUN = timedelta(minutes=15)  # after the planned time: no worker, or nothing takes its turn
SHORT = timedelta(minutes=10)  # a run of less is never late
COMPARED = 5  # finished runs that say how long one takes
SKIPPED = ("SkippedNoNewData", "SkippedStillRunning")
UNREACHABLE = timedelta(minutes=5)
KEPT = 500

logger = logging.getLogger(__name__)


@dataclass
class Alarms:
    """What has been told, and whom to tell when the server cannot be asked."""

    file: Path
    blocks: dict[str, Block] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    answered: datetime = field(default_factory=lambda: now("UTC"))

    @classmethod
    def of(cls, file: Path) -> "Alarms":
        """With what an earlier watch has told; a damaged file is as good as none."""
        try:
            told = [str(one) for one in json.loads(file.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            told = []
        return cls(file, told=told)

    def look(self, client: SyncPrefectClient) -> None:
        """Tell of every deployment what is late, and what has not succeeded for long."""
        flows = FlowFilter.model_validate({"name": {"any_": list(FLOWS)}})
        for deployment in client.read_deployments(flow_filter=flows):
            people = whom(deployment)
            self.remember(people.notify)
            for run in late_runs(client, deployment):
                self.tell(people.notify, f"late {run.id}", f"{deployment.name} {run.name} is late", when_due(run))
            if people.notify:
                self.tell_of_no_success(client, deployment, people)
        self.answered = now("UTC")

    def tell_of_no_success(
        self, client: SyncPrefectClient, deployment: DeploymentResponse, people: UnattendedSettings
    ) -> None:
        """Once for every success that is too long ago."""
        last, since = last_success(client, deployment)
        days = timedelta(days=people.notify_after_days)
        if any(schedule.active for schedule in deployment.schedules) and now("UTC") - since > days:
            subject = f"{deployment.name}: no run has succeeded for {people.notify_after_days:g} days"
            body = f"The last success: {last.name}, {last.end_time:%Y-%m-%d %H:%M} UTC." if last else "None has ever."
            self.tell(people.notify, f"no success since {since}", subject, body)

    def unreachable(self, error: Exception) -> None:
        """Tell all that are known, once for each time the server is away."""
        away = now("UTC") - self.answered
        if away < UNREACHABLE:
            return
        text = (
            f"No answer for {away.total_seconds() / 60:.0f} minutes: {without_paths(error)}. Runs go on; none begins."
        )
        for name in list(self.blocks):
            self.tell(name, f"away since {self.answered} {name}", "The Prefect server does not answer", text)

    def remember(self, name: str | None) -> None:
        """Load a block, so that it is there when the server is not."""
        if name and name not in self.blocks:
            import prefect.blocks.notifications  # noqa: F401  # Block.load has to know their types

            try:
                self.blocks[name] = Block.load(name, _sync=True)  # type: ignore[call-arg, assignment]  # may be async
            except Exception as error:
                logger.warning("notify=%r: %s", name, without_paths(error))

    def tell(self, name: str | None, what: str, subject: str, body: str) -> None:
        """One message, unless it has been sent; a receiver that is away is tried again at the next look."""
        if what in self.told or (name and name not in self.blocks):
            return
        logger.warning("%s: %s", subject, body)
        try:
            if name:
                self.blocks[name].notify(body, subject=subject)  # type: ignore[attr-defined]  # a notification block
        except Exception as error:
            logger.warning("notify=%r: %r was not told: %s", name, subject, without_paths(error))
            return
        self.told = [*self.told, what][-KEPT:]
        write_atomically(self.file, json.dumps(self.told), 0o600)


def whom(deployment: DeploymentResponse) -> UnattendedSettings:
    """The settings of the first active schedule that names a receiver, else those of the deployment."""
    active = [schedule.parameters for schedule in deployment.schedules if schedule.active]
    for parameters in [*active, {}]:
        people = unattended({**deployment.parameters, **parameters}, str(uuid4()))
        if people.notify:
            return people
    return people


def late_runs(client: SyncPrefectClient, deployment: DeploymentResponse) -> list[FlowRun]:
    """Those that should have begun, and those that take more than twice as long as the longest of the last ones."""
    waiting = _runs(client, deployment, [StateType.SCHEDULED, StateType.PENDING])
    not_begun = [run for run in waiting if run.next_scheduled_start_time and _age(run) > NOT_BEGUN]
    usual = max((run.total_run_time for run in successes(client, deployment)), default=timedelta.max / 4)
    running = _runs(client, deployment, [StateType.RUNNING])
    return not_begun + [run for run in running if _run_time(run) > max(2 * usual, SHORT)]


def successes(client: SyncPrefectClient, deployment: DeploymentResponse) -> list[FlowRun]:
    """The last runs that came to their end and did something, the newest first."""
    done = _runs(client, deployment, [StateType.COMPLETED])
    return [run for run in done if run.state and run.state.name not in SKIPPED][:COMPARED]


def last_success(client: SyncPrefectClient, deployment: DeploymentResponse) -> tuple[FlowRun | None, datetime]:
    """The last run that completed (nothing new to train on is a success as well), and since when there is none."""
    done = _runs(client, deployment, [StateType.COMPLETED])
    if done and done[0].end_time:
        return done[0], done[0].end_time
    return None, deployment.created or now("UTC")


def when_due(run: FlowRun) -> str:
    """In words."""
    due = run.expected_start_time or run.created
    state = run.state.name if run.state else "unknown"
    return f"planned for {due:%Y-%m-%d %H:%M} UTC, it is {state}."


def _runs(client: SyncPrefectClient, deployment: DeploymentResponse, states: list[StateType]) -> list[FlowRun]:
    wanted: dict[str, Any] = {"deployment_id": {"any_": [deployment.id]}, "state": {"type": {"any_": states}}}
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(wanted), sort=FlowRunSort.START_TIME_DESC, limit=50
    )


def _age(run: FlowRun) -> timedelta:
    assert run.next_scheduled_start_time, "asked of scheduled runs"
    return now("UTC") - run.next_scheduled_start_time


def _run_time(run: FlowRun) -> timedelta:
    return now("UTC") - run.state.timestamp if run.state else timedelta()
