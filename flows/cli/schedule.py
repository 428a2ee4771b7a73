"""`panda schedule`: when which deployment runs, and with which settings.

In: a cron line, a name, the settings of those runs (`--conf_path`, read anew by each run, and flags). Out: schedules on
the Prefect server; a list of them. Prefect's own commands make schedules without settings and lose the settings of one
that they pause or resume (`flows.stack.schedules`). Settings are checked here, not on the night of the first run.
Cost: 3 s of imports, a request or two.
"""

import os
from pathlib import Path
from typing import Any

from configs.cli import CONF_PATH, JSON, VERBOSE, CommandLine, Switch, configure
from configs.errors import did_you_mean
from configs.settings import PandaSettings
from data_prep.errors import PandaError
from flows.cli.run import print_json
from flows.stack.prefect_home import address
from flows.stack.prefect_server import unusable
from training.tracking.redact import redact_text

USAGE = "panda schedule [list | add NAME | pause NAME | resume NAME | remove NAME]"
TEXT = (
    "Show or change when deployments run, and with which settings. "
    'panda schedule add nightly --cron "0 3 * * *" --conf_path nightly.yaml'
)
CRON = Switch("cron", "When: minute hour day month weekday, such as '0 3 * * 0'.", {"metavar": "CRON"})
TIMEZONE = Switch("timezone", "Time zone of --cron (UTC).", {"metavar": "NAME", "default": "UTC"})
DEPLOYMENT = Switch(
    "deployment", "What runs (panda-train/default).", {"metavar": "FLOW/NAME", "default": "panda-train/default"}
)
ACTIONS = ("list", "add", "pause", "resume", "remove")


class ScheduleError(PandaError):
    """A schedule that is not there, or cannot be made."""


def main(argv: list[str]) -> int:
    """List schedules, or change one."""
    words = [word for word in argv[:2] if not word.startswith("-")] if argv[:1] and argv[0][:1] != "-" else []
    line, loaded = configure(USAGE, TEXT, argv[len(words) :], [CRON, TIMEZONE, DEPLOYMENT, CONF_PATH, JSON, VERBOSE])
    action, name = _asked(words, line)
    settings = _settings(line, loaded.settings) if action == "add" else {}
    there = address()
    if reason := unusable(there):
        raise ScheduleError(f"{reason}; panda up starts one")
    os.environ.update(there.variables())
    if action == "list":
        return _list(line)
    if action == "add":
        _add(name, line, settings)
    else:
        _change(action, name, line.switches.deployment)
    return _list(line)


def _asked(words: list[str], line: CommandLine) -> tuple[str, str]:
    """(Action, name of the schedule); without words, `--cron` adds one and nothing lists them."""
    conf = line.switches.conf_path
    action = words[0] if words else "add" if line.switches.cron else "list"
    if action not in ACTIONS:
        raise ScheduleError(f"{action!r} is no action{did_you_mean(action, ACTIONS)}; usage: {USAGE}")
    name = words[1] if len(words) > 1 else Path(conf).stem if action == "add" and conf else ""
    if action == "add" and not line.switches.cron:
        raise ScheduleError("add: say when with --cron, such as --cron '0 3 * * 0' (minute hour day month weekday)")
    if action != "list" and not name:
        raise ScheduleError(f"{action}: give the name of the schedule; usage: {USAGE}")
    return action, name


def _settings(line: CommandLine, settings: PandaSettings) -> dict[str, Any]:
    """What was typed, as parameters of the runs: checked values, and the file under a path that holds everywhere."""
    plain = settings.model_dump(mode="json")
    typed = {name: plain[name] for name in line.values if line.values[name] is not None}
    nothing = [f"{name}=null" for name, value in line.values.items() if value is None]
    overrides = [*line.overrides, *nothing]
    conf = line.switches.conf_path
    return {
        **({"conf_path": str(Path(conf).absolute())} if conf else {}),
        **typed,
        **({"overrides": overrides} if overrides else {}),
    }


def _add(name: str, line: CommandLine, settings: dict[str, Any]) -> None:
    """Make the schedule, or give the one of this name another time and other settings."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        when = CronSchedule(cron=line.switches.cron, timezone=line.switches.timezone)
    except ValidationError as error:
        problem = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ScheduleError(f"--cron {line.switches.cron!r} --timezone {line.switches.timezone!r}: {problem}") from None
    if name in _declared(line.switches.deployment):
        raise ScheduleError(f"{name} is in prefect.yaml, which panda up applies: change it there, or take another name")
    with get_client(sync_client=True) as client:
        deployment = _deployment(client, line.switches.deployment)
        unknown = settings.keys() - deployment.parameter_openapi_schema["properties"].keys()
        if unknown:
            raise ScheduleError(f"{line.switches.deployment} has no setting {', '.join(sorted(unknown))}")
        known = next((one for one in deployment.schedules if one.slug == name), None)
        if known:
            client.update_deployment_schedule(deployment.id, known.id, schedule=when, parameters=settings)
        else:
            made = DeploymentScheduleCreate(schedule=when, active=True, slug=name, parameters=settings)
            client.create_deployment_schedules(deployment.id, [made])


def _declared(deployment: str) -> set[str]:
    """The names of the schedules that prefect.yaml gives a deployment."""
    from flows.stack.deployments import declared
    from flows.stack.schedules import full_name

    entries = declared() if Path("prefect.yaml").exists() else []
    return {
        one.get("slug", "") for entry in entries if full_name(entry) == deployment for one in entry.get("schedules", [])
    }


def _change(action: str, name: str, wanted: str) -> None:
    from prefect.client.orchestration import get_client

    from flows.stack import schedules

    with get_client(sync_client=True) as client:
        deployment = _deployment(client, wanted)
        named = {schedule.slug or str(schedule.id): schedule for schedule in deployment.schedules}
        if name not in named:
            there = ", ".join(sorted(named)) or "none"
            raise ScheduleError(f"{wanted} has no schedule {name!r}{did_you_mean(name, named)}; it has: {there}")
        if action == "remove":
            client.delete_deployment_schedule(deployment.id, named[name].id)
        else:
            schedules.update(client, deployment, named[name], active=action == "resume")


def _deployment(client: Any, name: str) -> Any:
    from flows.stack.schedules import deployments

    there = deployments(client)
    if name not in there:
        names = ", ".join(sorted(there)) or "none; panda up puts those of prefect.yaml there"
        raise ScheduleError(
            f"the Prefect server has no deployment {name!r}{did_you_mean(name, there)}; it has: {names}"
        )
    return there[name]


def _list(line: CommandLine) -> int:
    """Show every schedule."""
    rows = _rows()
    if line.switches.json:
        print_json({"schedules": rows})
        return 0
    for row in rows:
        given = " ".join(f"{name}={value}" for name, value in row["settings"].items())
        state = "active" if row["active"] else "paused"
        print(
            f"{row['name']:<20} {state}  {row['when']:<28} {row['deployment']}  ",
            redact_text(given) or "settings as in the YAML files",
        )
    if not rows:
        print(f"no schedule; {TEXT.rsplit('. ', maxsplit=1)[1]}")
    return 0


def _rows() -> list[dict[str, Any]]:
    """Every schedule with what it runs and its settings: of the deployment itself, then of the schedule."""
    from prefect.client.orchestration import get_client

    from flows.stack.schedules import deployments

    with get_client(sync_client=True) as client:
        return [
            {
                "name": schedule.slug or str(schedule.id),
                "deployment": name,
                "active": schedule.active,
                "when": _when(schedule.schedule),
                "settings": {**deployment.parameters, **schedule.parameters},
            }
            for name, deployment in sorted(deployments(client).items())
            for schedule in deployment.schedules
        ]


def _when(schedule: Any) -> str:
    """A schedule in a few words."""
    zone = getattr(schedule, "timezone", None) or "UTC"
    if hasattr(schedule, "cron"):
        return f"{schedule.cron} {zone}"
    if hasattr(schedule, "interval"):
        return f"every {schedule.interval}"
    return f"{schedule.rrule} {zone}"
