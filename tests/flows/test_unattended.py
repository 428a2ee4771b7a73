"""Retraining that nobody watches, for real: from the champion, by turns, on a machine that dies."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.events.filters import EventFilter
from prefect.states import Crashed

from flows.parts.policy import CORPUS_EVENT_TAG
from flows.watch.restarts import RESTARTING
from tasks.assets import MATERIALIZED
from tests.support.stack import LONG, Stack, num_steps, running_stack, wait_for
from training.registry.versions import Registry
from training.tracking.sync import connect
from training.tracking.tags import PARENT_TAG

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1800)]
MODEL = "panda-panda-tiny"


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unattended")
    with running_stack(folder) as up:
        yield up


@pytest.fixture(scope="module")
def first(stack: Stack):
    """A run that has registered version 1."""
    run = stack.start(stack.config("short", max_steps=6))
    assert stack.end_of(run).name == "Completed"
    return run


@pytest.fixture(scope="module")
def registry(stack: Stack, first):
    return Registry(f"sqlite:///{stack.outputs('short')}/mlflow.db")


@pytest.fixture(scope="module")
def grown(stack: Stack, first):
    """A configuration whose corpus has 300 instructions more than that of the first run."""
    folder = stack.folder / "grown" / "instruction_tuning"
    shutil.copytree(stack.folder / "dataset" / "instruction_tuning", folder)
    records = [{"input": f"What is {i} plus {i}?", "target": f"{i} plus {i} is {2 * i}."} for i in range(300)]
    (folder / "sums.json").write_text(json.dumps(records))
    outputs = str(stack.outputs("short"))
    return stack.config("grown", max_steps=6, instruction_tuning_data_dir=str(folder), output_dir=outputs)


def test_links_lead_to_mlflow_and_back(stack, first, registry):
    version = registry.versions(MODEL)[0]
    assert f"/runs/{version.run_id}" in stack.artifacts(first)["links"]
    tags = connect(registry.uri).get_run(version.run_id).data.tags
    assert tags["prefect.flow_run_url"].endswith(f"/flow-run/{first}")


def test_corpus_plan_and_version_are_told_as_assets(stack, first):
    wait_for(lambda: f"panda://models/{MODEL}/1" in made(stack), 60, "the asset event of the version")
    of = made(stack)
    (plan,) = of[f"panda://models/{MODEL}/1"]
    assert plan.startswith("panda://plans/")
    (corpus,) = of[plan]
    assert corpus.startswith("panda://corpora/") and of[corpus] == []


def made(stack: Stack) -> dict[str, list[str]]:
    """Asset -> the assets it was made of."""
    wanted = EventFilter.model_validate({"event": {"name": [MATERIALIZED]}})
    with stack.client() as client:
        events = client.read_events(wanted, limit=50).events
    return {
        event.resource.id: [one.id for one in event.related if one.get("prefect.resource.role") == "asset"]
        for event in events
    }


class TestNextVersion:
    def test_not_for_too_few_new_target_tokens(self, stack, grown):
        state = stack.end_of(stack.start(grown, min_new_target_tokens=1_000_000))
        assert (state.type.value, state.name) == ("COMPLETED", "SkippedNoNewData")
        assert f"target tokens more than models:/{MODEL}/1 was made of" in state.message

    def test_from_the_champion_and_told(self, stack, grown, registry):
        assert "champion" in registry.versions(MODEL)[0].aliases
        wanted = {"init_from": "champion", "replay_share": 0.25, "min_new_target_tokens": 100}
        with stack.webhook() as (block, received):
            run = stack.start(grown, notify=block, **wanted)
            assert stack.end_of(run).name == "Completed"
        assert "from the champion" in stack.flow_run(run).name
        stack.wait_for_log(run, f"starting from the champion models:/{MODEL}/1")
        version = registry.versions(MODEL)[1]
        assert version.tags[PARENT_TAG] == f"models:/{MODEL}/1"
        report = {row["what"]: row["number"] for row in json.loads(stack.artifacts(run)["data-report"])}
        assert int(report["dropped: not_replayed"].replace(",", "")) > 500
        become = "is the champion now" if "champion" in version.aliases else "stays challenger"
        alarm, version_told = [message["subject"] for message in received]
        assert alarm.endswith(f": the corpus has changed since models:/{MODEL}/1")  # sums are a new subject
        assert version_told == f"{MODEL} version 2 {become}"


class TestOtherDeployments:
    def test_prepare(self, stack, first):
        conf = stack.config("prepared", cache_dir=str(stack.folder / "cache-of-prepare"))
        state = stack.end_of(stack.start(conf, "panda-prepare/default"))
        assert (state.type.value, state.name) == ("COMPLETED", "Prepared")
        assert "target tokens in" in state.message

    def test_evaluate(self, stack, first):
        state = stack.end_of(stack.start(stack.config("short"), "panda-evaluate/default"))
        assert (state.type.value, state.name) == ("COMPLETED", "Evaluated")
        assert re.fullmatch(r"held-out loss: instruction [\d.]+, pretraining [\d.]+, all [\d.]+", state.message)


def test_by_turns(stack, first):
    """While one trains, a run by hand waits for its turn, and a scheduled one gives up when it has had to wait."""
    training = stack.start(stack.config("turns", **LONG), until_stage="train")
    stack.wait_until_training(training, "turns", 1)
    by_hand = stack.start(stack.config("short", max_steps=6), until_stage="plan")
    with stack.webhook() as (block, received):
        conf = stack.config("scheduled", notify=block, notify_after_skips=1)
        with stack.default_parameters(conf_path=conf), stack.schedule("--interval", "60"):
            wait_for(lambda: waiting(stack), 240, "a scheduled run that waits")
            assert stack.flow_run(training).state.name == "Running"
            assert stack.flow_run(by_hand).state.name == "AwaitingConcurrencySlot"
            stack.cancel(training)
            scheduled = stack.end_of(waiting(stack)[0].id)
    assert stack.end_of(by_hand).name == "Prepared"
    assert (scheduled.type.value, scheduled.name) == ("CANCELLED", "SkippedStillRunning")
    # a later scheduled run may have found nobody at work, and trained, or have waited as well, before this one looked
    told = [message for message in received if message["subject"] == "panda-train: 1 scheduled run was skipped"]
    assert told and all("another run was at work when this one was due" in message["body"] for message in told)


def waiting(stack: Stack) -> list:
    """Scheduled runs whose turn has not come."""
    return [run for run in stack.scheduled_runs() if run.state.name == "AwaitingConcurrencySlot"]


TEN_EVENTS = """
import asyncio
from prefect.events import Event
from prefect.events.clients import get_events_client

async def main():
    async with get_events_client() as client:
        for _ in range(10):
            resource = {"prefect.resource.id": "panda.corpus.feed"}
            await client.emit(Event(event="panda.corpus.updated", resource=resource))

asyncio.run(main())
"""


def test_ten_events_start_one_run(stack, first, grown):
    """What a feed says when it has brought something; the settings are those of the paused schedule it names."""
    stack.schedule_verb("add", "feed", "--cron", "0 3 1 1 *", "--conf_path", grown, "--until_stage", "plan")
    stack.schedule_verb("pause", "feed")
    subprocess.run([sys.executable, "-c", TEN_EVENTS], cwd=stack.project, env=stack.env, check=True)
    wait_for(lambda: by_event(stack), 120, "a run that an event has started")
    run = by_event(stack)[0]
    assert run.parameters == {"conf_path": grown, "until_stage": "plan"}
    assert stack.end_of(run.id).name == "Prepared"
    assert len(by_event(stack)) == 1
    stack.schedule_verb("remove", "feed")


def by_event(stack: Stack) -> list:
    with stack.client() as client:
        return [run for run in client.read_flow_runs() if CORPUS_EVENT_TAG in run.tags]


def test_lost_machine_is_crashed_by_the_automation(stack, first):
    """Nobody is left to report or tell: engine and worker are killed together, as by a power cut."""
    with stack.webhook("lost") as (block, received):
        run = stack.start(stack.config("lost", notify=block, **LONG), until_stage="train")
        lose(stack, run)
        wait_for(lambda: received, 60, "the message")
    assert [message["subject"] for message in received] == [f"panda-train {stack.flow_run(run).name}: Crashed"]
    assert "No heartbeat for 90 s" in received[0]["body"] and f"/flow-run/{run}" in received[0]["body"]


def lose(stack: Stack, run: UUID) -> None:
    stack.wait_until_training(run, "lost", 1)
    engine = stack.engine(run)
    engine.send_signal(signal.SIGSTOP)  # so that it does not hear of the worker's end
    os.kill(stack.worker_pid(), signal.SIGKILL)
    engine.send_signal(signal.SIGKILL)
    wait_for(lambda: not stack.processes(run), 40, "the end of all processes")
    assert stack.flow_run(run).state.name == "Running"
    state = stack.end_of(run, 180)
    assert (state.type.value, state.name) == ("CRASHED", "Crashed")
    assert "No heartbeat for 90 s" in state.message


class TestHeals:
    """What has crashed goes on without a person (`flows.watch`)."""

    def test_what_always_crashes_is_started_so_often_and_once_more(self, stack, first):
        began = stack.folder / "began"
        reader = (
            f"import os\n\ndef crash(path):\n    open({str(began)!r}, 'a').write('.')\n    os.kill(os.getpid(), 9)\n"
        )
        (stack.project / "crashing.py").write_text(reader)
        conf = stack.config("crashing", reader={"_target_": "crashing.crash"}, max_restarts=1)
        run = stack.start(conf, "panda-prepare/default")
        wait_for(lambda: stack.flow_run(run).state.name == "CrashedTooOften", 300, "the end of trying")
        state = stack.flow_run(run).state
        assert state.type.value == "FAILED"
        assert state.message.startswith("it has crashed 2 times; max_restarts is 1. The last time: Process exited with")
        assert began.read_text() == ".."

    def test_a_killed_run_goes_on_in_its_own_directory(self, stack, first):
        run = stack.start(stack.config("healed", max_restarts=3, **LONG), until_stage="train", run_name="healed")
        run_dir = stack.wait_until_training(run, "healed", 6)
        stack.engine(run).send_signal(signal.SIGKILL)
        wait_for(lambda: not stack.processes(run), 60, "the end of all processes")
        before = num_steps(run_dir)
        wait_for(lambda: num_steps(run_dir) >= before + 6, 300, "the training of the run started again")
        assert [path.parent for path in stack.outputs("healed").glob("*/config.yaml")] == [run_dir]
        stack.cancel(run)
        stack.wait_for_cancelled(run)

    def test_a_run_cancelled_before_its_restart_is_cancelled(self, stack, first):
        """Waiting or about to begin: its worker knows that it has started once, and leaves saying so to the process."""
        run = stack.start(stack.config("waiting", max_restarts=3, **LONG), until_stage="train")
        stack.wait_until_training(run, "waiting", 1)
        stack.engine(run).send_signal(signal.SIGKILL)
        wait_for(lambda: RESTARTING in state_names(stack, run), 120, "the plan to start it again")
        stack.cancel(run)
        stack.wait_for_cancelled(run)

    def test_a_run_taken_for_dead_is_running_again(self, stack, first):
        """The server was away, and its automation judged by silence; the process has never stopped."""
        run = stack.start(stack.config("silent", max_restarts=3, **LONG), until_stage="train")
        stack.wait_until_training(run, "silent", 1)
        engine = stack.engine(run).pid
        with stack.client() as client:
            client.set_flow_run_state(run, Crashed(message="No heartbeat for 90 s: the flow's process"), force=True)
        wait_for(lambda: stack.flow_run(run).state.name == "Running", 120, "the state of what goes on")
        assert stack.engine(run).pid == engine
        stack.cancel(run)
        stack.wait_for_cancelled(run)


def state_names(stack: Stack, run: UUID) -> list[str]:
    with stack.client() as client:
        return [state.name for state in client.read_flow_run_states(run)]


def test_kubernetes_example_is_accepted(stack):
    """Pool and deployment, as documented; there is no cluster here to run it on."""
    pool = ["work-pool", "create", "panda-kubernetes", "--type", "kubernetes"]
    created = stack.prefect(*pool, "--base-job-template", "deploy/kubernetes/pool.json")
    assert created.returncode == 0, created.stdout + created.stderr
    deployed = stack.prefect("deploy", "--all", "--prefect-file", "deploy/kubernetes/prefect.yaml")
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    run = stack.prefect("deployment", "run", "panda-train/kubernetes", "--job-variable", "gpus=-1")
    assert run.returncode == 1
    assert "-1 is less than the minimum of 0" in " ".join((run.stdout + run.stderr).split())


def test_slurm_worker_runs_one_run_and_stops_it_in_time(stack, first):
    """The script of the example, by bash instead of sbatch, with a pool of its own; TERM as SLURM sends it."""
    with stack.client() as client:
        client.create_work_pool(WorkPoolCreate(name="panda-slurm", type="process"))
        deployment = client.read_deployment_by_name("panda-train/default")
        client.update_deployment(
            deployment.id, DeploymentUpdate(work_pool_name="panda-slurm", work_queue_name="default")
        )
    run = stack.start(stack.config("slurm", **LONG), until_stage="train")
    path = f"{Path(sys.executable).parent}:{stack.env['PATH']}"
    env = {**stack.env, "PANDA_POOL": "panda-slurm", "PATH": path}
    with open(stack.folder / "slurm.log", "wb") as log:
        job = subprocess.Popen(["bash", "deploy/slurm/worker.sh"], cwd=stack.project, env=env, stdout=log, stderr=log)
    run_dir = stack.wait_until_training(run, "slurm", 1)
    job.terminate()
    assert job.wait(timeout=90) == 0
    assert not stack.processes(run)
    assert list((run_dir / "checkpoints").glob("step-*"))
    assert stack.end_of(run, 60).type.value == "CRASHED"
