"""Put onto a Prefect server what operations need there: work pool, deployments, an automation. Safe to repeat.

In: prefect.yaml in the working directory; the server at PREFECT_API_URL. Out: nothing; schedules made by hand stay, and
whether a schedule is paused stays as the user left it (the one in prefect.yaml is paused when it first appears).
Cost: ~6 s, mostly two imports of Prefect.
"""

import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from data_prep.errors import PandaError
from flows.stack import schedules
from flows.stack.services import HEARTBEAT, POOL

MISSED_HEARTBEATS = 3
OF_THE_WORKER = ("command", "env", "working_dir")
"""What a run of the pool has from its worker: who starts a run cannot choose another command or environment for it."""


def deploy() -> None:
    """Pool, then `prefect deploy --all`, then the automation."""
    with get_client(sync_client=True) as client:
        _ensure_pool(client)
        states = schedules.name_all(client, declared())
        _prefect_deploy()
        schedules.restore(client, states)
    deploy_automation()


def deploy_automation() -> None:
    """The automation of our runs."""
    with get_client(sync_client=True) as client:
        ensure_automation(client, crash_silent_runs())


def crash_silent_runs() -> AutomationCore:
    """Heartbeats are sent by every flow run, and nothing on a self-hosted server listens to them unless told to.

    Should the event of a run's end be lost, this fires on a run that has ended; the server then refuses the change.
    """
    seconds = MISSED_HEARTBEATS * (get_current_settings().flows.heartbeat_frequency or 30)
    return AutomationCore(
        name="panda: runs without heartbeat have crashed",
        description=f"No sign of life for {seconds} s: the process, its worker or its machine is gone.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={
                HEARTBEAT,
                *(f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Crashed", "Cancelled", "Paused")),
            },
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=seconds),
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                force=False,
                message=f"No heartbeat for {seconds} s: the flow's process, its worker or its machine is gone. "
                "The next run with resume goes on from the last checkpoint.",
            )
        ],
    )


def ensure_automation(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """One automation of that name, as stated here; whether it is enabled stays the user's.

    One that is right already is left alone: an update makes it forget the runs it is watching.
    """
    known: list[Automation] = client.read_automations_by_name(automation.name)
    if not known:
        client.create_automation(automation)
    elif _content(known[0]) != _content(automation):
        client.update_automation(known[0].id, automation.model_copy(update={"enabled": known[0].enabled}))


def _content(automation: AutomationCore) -> dict[str, Any]:
    """What an automation does, without what the server adds."""
    content = automation.model_dump(mode="json", include={"name", "description", "trigger", "actions"})
    trigger = {name: sorted(value) if isinstance(value, list) else value for name, value in content["trigger"].items()}
    return content | {"trigger": {name: value for name, value in trigger.items() if name != "id"}}


def _ensure_pool(client: SyncPrefectClient) -> None:
    """The pool, if the worker that starts meanwhile has not made it first, and then with Prefect's own template."""
    offered = ProcessWorker.get_default_base_job_template()
    try:
        made = client.read_work_pool(POOL).base_job_template
    except ObjectNotFound:
        made = offered
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=pool_template()))
            return
    if made == offered:  # one that its owner has written stays
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=pool_template()))


def pool_template() -> dict[str, Any]:
    """Prefect's template of a process, without the variables that would let a run be any command."""
    template: dict[str, Any] = ProcessWorker.get_default_base_job_template()
    for name in OF_THE_WORKER:
        del template["variables"]["properties"][name], template["job_configuration"][name]
    template["variables"]["additionalProperties"] = False
    return template


def _prefect_deploy() -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PandaError(f"prefect deploy --all failed:\n{done.stdout}{done.stderr}".strip())


def declared() -> list[dict[str, Any]]:
    """The deployments of prefect.yaml."""
    path = Path("prefect.yaml")
    if not path.exists():
        raise PandaError("no prefect.yaml here; run this in the directory of the project")
    return yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]
