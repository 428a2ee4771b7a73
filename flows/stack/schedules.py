"""The schedules of our deployments on a Prefect server, kept through what Prefect does to them.

In: a client. Out: schedules by name, as people left them. Two habits of Prefect 3.8 make it necessary:

- Applying a prefect.yaml with `schedules:` removes a deployment's other schedules, if any of them has no name (slug),
  and `prefect deployment schedule create` gives none. When all have names, only those of the file are touched.
- A change of a schedule that does not send its parameters along removes them (`prefect deployment schedule pause` and
  `resume`, the switch in the UI), and the next run trains with other settings. `update` sends them along.

Cost: one request a deployment and change.
"""

from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse

States = dict[str, dict[str, bool]]
"""Deployment -> name of a schedule -> whether it is active."""


def deployments(client: SyncPrefectClient) -> dict[str, DeploymentResponse]:
    """All deployments on the server by flow/name."""
    flows = {flow.id: flow.name for flow in client.read_flows()}
    return {f"{flows.get(found.flow_id)}/{found.name}": found for found in client.read_deployments()}


def full_name(entry: dict[str, Any]) -> str:
    """The flow/name of an entry of prefect.yaml; a flow is called as its function, with hyphens."""
    return f"{entry['entrypoint'].rpartition(':')[2].replace('_', '-')}/{entry['name']}"


def name_all(client: SyncPrefectClient, declared: list[dict[str, Any]]) -> States:
    """Give every schedule of these deployments a name, so that applying prefect.yaml leaves it alone.

    :returns: which of them are active.
    """
    states: States = {}
    there = deployments(client)
    for name in map(full_name, declared):
        states[name] = {}
        for schedule in there[name].schedules if name in there else ():
            slug = schedule.slug or f"by-hand-{str(schedule.id)[:8]}"
            if not schedule.slug:
                update(client, there[name], schedule, slug=slug)
            states[name][slug] = schedule.active
    return states


def restore(client: SyncPrefectClient, states: States) -> None:
    """Undo what applying prefect.yaml did to schedules that a person had activated or paused."""
    there = deployments(client)
    for name, before in states.items():
        for schedule in there[name].schedules if name in there else ():
            active = before.get(schedule.slug or "", schedule.active)
            if active != schedule.active:
                update(client, there[name], schedule, active=active)


def update(
    client: SyncPrefectClient, deployment: DeploymentResponse, schedule: DeploymentSchedule, **changes: Any
) -> None:
    """Change something about a schedule, and keep its parameters."""
    kept = {"parameters": schedule.parameters, **changes}
    client.update_deployment_schedule(deployment.id, schedule.id, **kept)
