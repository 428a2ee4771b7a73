"""Which runs of our flows Prefect has not ended.

In: the server of this project, if it answers. Out: ids; None where nobody answers. A run that crashed may be started
again, so it goes on as well. Cost: a request for 200 runs.
"""

import os

from flows.stack.prefect_home import address
from flows.stack.prefect_server import unusable

OURS = ("panda-train", "panda-prepare", "panda-evaluate")
GOES_ON = ("SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING", "CRASHED")
PAGE = 200


def going_on() -> set[str] | None:
    """Ask the server."""
    there = address()
    if unusable(there):
        return None
    os.environ.update(there.variables())
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowRunFilter

    found: set[str] = set()
    ours = FlowFilter.model_validate({"name": {"any_": list(OURS)}})
    open_ones = FlowRunFilter.model_validate({"state": {"type": {"any_": list(GOES_ON)}}})
    with get_client(sync_client=True) as client:
        offset = 0
        while page := client.read_flow_runs(flow_filter=ours, flow_run_filter=open_ones, limit=PAGE, offset=offset):
            found |= {str(run.id) for run in page}
            offset += len(page)
    return found
