"""Runs of our flows on the Prefect server, as items of the policy, and taking one away with its logs and artifacts.

In: the server that is used, if it answers. Out: `Item`s; None where nobody answers, and then nothing of it is freed. A
run that has not ended is kept; one that crashed may be started again, so its directory is not done with. Cost: a
request for 200 runs, three a deletion.
"""

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from flows.retention.policy import FLOW_RUN, Item, Key
from flows.stack.prefect_home import address
from flows.stack.prefect_server import unusable

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

OURS = ("panda-train", "panda-prepare", "panda-evaluate")
PAGE = 200
CRASHED = "CRASHED"


@dataclass(frozen=True)
class FlowRuns:
    """Our runs; `open`: ids of those that go on or may go on."""

    is_own_server: bool  # of this project; one that its user has named may be that of others too
    items: list[Item]
    open: frozenset[str]


def flow_runs() -> FlowRuns | None:
    """Ask the server."""
    there = address()
    if unusable(there):
        return None
    os.environ.update(there.variables())
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.sorting import FlowRunSort

    found: list[FlowRun] = []
    ours = FlowFilter.model_validate({"name": {"any_": list(OURS)}})
    with get_client(sync_client=True) as client:
        while len(found) % PAGE == 0:
            newest_first = FlowRunSort.START_TIME_DESC
            page = client.read_flow_runs(flow_filter=ours, sort=newest_first, limit=PAGE, offset=len(found))
            if not page:
                break
            found += page
    ranks: dict[tuple[UUID | None, str], int] = {}
    items, going_on = [], set()
    for run in found:
        state = run.state.type.value if run.state else ""
        ended = run.end_time if run.state and run.state.is_final() else None
        rank = 0
        if ended:
            rank = ranks[run.deployment_id, state] = ranks.get((run.deployment_id, state), -1) + 1
        if not ended or state == CRASHED:
            going_on.add(str(run.id))
        keep, made = ("", ended.timestamp()) if ended else ("has not ended", 0.0)
        items.append(Item(Key(FLOW_RUN, str(run.id)), made=made, keep=keep, rank=rank))
    return FlowRuns(not there.by_user, items, frozenset(going_on))


def remove(client: "SyncPrefectClient", flow_run: str) -> None:
    """Artifacts first, which the server would leave; logs, task runs and states it deletes with the run."""
    from prefect.client.schemas.filters import ArtifactFilter
    from prefect.exceptions import ObjectNotFound

    mine = ArtifactFilter.model_validate({"flow_run_id": {"any_": [flow_run]}})
    while artifacts := client.read_artifacts(artifact_filter=mine, limit=PAGE):
        for artifact in artifacts:
            with contextlib.suppress(ObjectNotFound):
                client.delete_artifact(artifact.id)
    with contextlib.suppress(ObjectNotFound):
        client.delete_flow_run(UUID(flow_run))
