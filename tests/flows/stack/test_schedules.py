"""Schedules with settings: made by `panda schedule`, kept by `prefect deploy` and by what pauses and resumes them.

On a light server of the tests, which has the deployments but schedules nothing; that a scheduled run really gets its
settings is in `tests/flows/test_unattended.py`.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import temporary_settings

from flows.cli.main import main
from flows.stack import schedules
from flows.stack.deployments import declared, deploy
from tests.support import warm

ROOT = Path(__file__).parents[3]
NAME = "panda-train/default"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def env(prefect_server, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", prefect_server.url)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", prefect_server.auth_string)
    monkeypatch.chdir(ROOT)
    return dict(os.environ)


@pytest.fixture(scope="module")
def deployed(prefect_server):
    """The deployments are on the server."""
    with pytest.MonkeyPatch.context() as patch, temporary_settings(prefect_server.settings):
        patch.setenv("PREFECT_API_URL", prefect_server.url)
        patch.setenv("PREFECT_API_AUTH_STRING", prefect_server.auth_string)
        patch.chdir(ROOT)
        deploy()


@pytest.fixture
def client(deployed, env, prefect_server):
    """Afterwards the schedules are as prefect.yaml says."""
    with temporary_settings(prefect_server.settings), get_client(sync_client=True) as client:
        yield client
        deployment = client.read_deployment_by_name(NAME)
        for schedule in deployment.schedules:
            if schedule.slug == "weekly":
                client.update_deployment_schedule(deployment.id, schedule.id, active=False, parameters={})
            else:
                client.delete_deployment_schedule(deployment.id, schedule.id)


def on_server(client) -> dict[str | None, tuple]:
    """Name of a schedule -> (cron, active, parameters)."""
    found = client.read_deployment_by_name(NAME).schedules
    return {one.slug: (one.schedule.cron, one.active, one.parameters) for one in found}


def panda(env, *words: str) -> str:
    done = warm.run([sys.executable, "-m", "flows.cli.main", "schedule", *words], ROOT, env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def prefect(env, *words: str) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
    done = warm.run(command, ROOT, env)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def conf(tmp_path) -> str:
    path = tmp_path / "nightly.yaml"
    path.write_text("model: panda-tiny\nmax_steps: 3\n")
    return str(path)


def test_the_life_of_a_schedule(env, client, conf):
    settings = {"conf_path": conf, "lora_r": 4, "overrides": ["architecture.hidden_size=32"]}
    flags = ["--lora_r", "4", "architecture.hidden_size=32"]
    shown = panda(env, "--cron", "0 3 * * 0", "--timezone", "Europe/Berlin", "--conf_path", conf, *flags)
    assert f"conf_path={conf} lora_r=4" in shown
    assert on_server(client)["nightly"] == ("0 3 * * 0", True, settings)
    panda(env, "pause", "nightly")
    assert on_server(client)["nightly"] == ("0 3 * * 0", False, settings)
    panda(env, "resume", "nightly")
    assert on_server(client)["nightly"] == ("0 3 * * 0", True, settings)
    panda(env, "add", "nightly", "--cron", "0 4 * * *", "--conf_path", conf)
    assert on_server(client)["nightly"] == ("0 4 * * *", True, {"conf_path": conf})
    listed = json.loads(panda(env, "--json").splitlines()[-1])["schedules"]
    assert [(one["name"], one["when"], one["active"]) for one in listed] == [
        ("nightly", "0 4 * * * UTC", True),
        ("weekly", "0 3 * * 0 UTC", False),
    ]
    panda(env, "remove", "nightly")
    assert list(on_server(client)) == ["weekly"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "x"], "add: say when with --cron"),
        (["add", "--cron", "0 3 * * 0"], "add: give the name"),
        (["add", "x", "--cron", "0 3 * *"], "--cron '0 3 * *'"),
        (["add", "x", "--cron", "0 3 * * 0", "--timezone", "Mars"], "--timezone 'Mars'"),
        (["add", "x", "--cron", "0 3 * * 0", "--lora_r", "0"], "lora_r=0: must be a whole number >= 1"),
        (["add", "x", "--cron", "0 3 * * 0", "--conf_path", "none.yaml"], "none.yaml"),
        (
            ["add", "x", "--cron", "0 3 * * 0", "--deployment", "panda-trin/default"],
            "did you mean panda-train/default?",
        ),
        (
            ["add", "x", "--cron", "0 3 * * 0", "--deployment", "panda-prepare/default", "--max_steps", "3"],
            "panda-prepare/default has no setting max_steps",
        ),
        (
            ["add", "weekly", "--cron", "0 3 * * 0"],
            "weekly is in prefect.yaml, which panda up applies: change it there",
        ),
        (["pause", "weakly"], "has no schedule 'weakly'; did you mean weekly?; it has: weekly"),
        (["stop", "weekly"], "'stop' is no action"),
    ],
)
def test_mistakes(client, words, message, capsys):
    assert main(["schedule", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(on_server(client)) == ["weekly"]


def test_the_settings_prefect_yaml_shows(env, client, conf, tmp_path):
    """The line for all runs of the deployment, without its comment sign: no pause removes those."""
    text = (ROOT / "prefect.yaml").read_text(encoding="utf-8")
    commented = "  # parameters: {conf_path: weekly.yaml}\n"
    assert commented in text
    path = tmp_path / "prefect.yaml"
    path.write_text(text.replace(commented, f"  parameters: {{conf_path: {conf}}}\n"), encoding="utf-8")
    prefect(env, "deploy", "--all", "--prefect-file", str(path))
    weekly = client.read_deployment_by_name(NAME).schedules[0]
    prefect(env, "deployment", "schedule", "resume", NAME, str(weekly.id))
    assert f"conf_path={conf}" in panda(env)
    assert client.read_deployment_by_name(NAME).parameters == {"conf_path": conf}
    prefect(env, "deploy", "--all")


def test_deploying_again_keeps_what_was_made_by_hand(env, client):
    """Also one without a name, as `prefect deployment schedule create` makes it, and whether it is active."""
    prefect(env, "deployment", "schedule", "create", NAME, "--cron", "0 2 * * *", "--timezone", "UTC")
    deployment = client.read_deployment_by_name(NAME)
    named = DeploymentScheduleCreate(
        schedule=CronSchedule(cron="0 4 * * *"), active=False, slug="mine", parameters={"max_steps": 3}
    )
    client.create_deployment_schedules(deployment.id, [named])
    weekly = next(one for one in deployment.schedules if one.slug == "weekly")
    schedules.update(client, deployment, weekly, active=True)
    deploy()
    deploy()
    there = on_server(client)
    by_hand = next(name for name in there if name not in ("mine", "weekly"))
    assert by_hand.startswith("by-hand-")
    assert there == {
        by_hand: ("0 2 * * *", True, {}),
        "mine": ("0 4 * * *", False, {"max_steps": 3}),
        "weekly": ("0 3 * * 0", True, {}),
    }
    prefect(env, "deploy", "--all")  # by hand as well, once all of them have names
    assert on_server(client).keys() == there.keys()


def test_what_prefect_itself_does(env, client):
    """The reason for all this; when it fails, Prefect has become kinder and `flows/stack/schedules.py` may go."""
    deployment = client.read_deployment_by_name(NAME)
    made = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 4 * * *"), active=True, parameters={"max_steps": 3})
    (mine,) = client.create_deployment_schedules(deployment.id, [made])
    prefect(env, "deployment", "schedule", "pause", NAME, str(mine.id))
    assert on_server(client)[None] == ("0 4 * * *", False, {}), "its settings are gone"
    prefect(env, "deploy", "--all")
    assert list(on_server(client)) == ["weekly"], "and it is removed"


def test_serving_keeps_them_too(env, client):
    """`panda serve-flow` sends what prefect.yaml says, with the settings of its schedules; others stay."""
    from flows.stack.serve import _named_schedules, runner_deployment

    prefect(env, "deployment", "schedule", "create", NAME, "--cron", "0 2 * * *", "--timezone", "UTC")
    deployment = client.read_deployment_by_name(NAME)
    weekly = next(one for one in deployment.schedules if one.slug == "weekly")
    schedules.update(client, deployment, weekly, active=True)
    entry = next(one for one in declared() if schedules.full_name(one) == NAME)
    entry["schedules"][0]["parameters"] = {"max_steps": 5}
    runner_deployment(entry, _named_schedules()).apply()
    there = on_server(client)
    assert there.pop("weekly") == ("0 3 * * 0", True, {"max_steps": 5})
    assert list(there.values()) == [("0 2 * * *", True, {})]
