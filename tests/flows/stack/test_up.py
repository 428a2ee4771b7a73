"""Operations for real: a stack brought up by `panda up`, runs by the very commands of the documentation."""

import os
import re
import signal
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from prefect.exceptions import PrefectHTTPStatusError

from flows.stack.prefect_server import http_status
from tests.support.stack import LONG, Stack, flow_run_id, listening, running_stack, wait_for
from training.launch.processes import is_alive

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("operations")
    with running_stack(folder) as up:
        yield up


@pytest.fixture(scope="module")
def first(stack: Stack):
    """The id of the first run, triggered and watched as the documentation says."""
    conf = stack.config("short", max_steps=6)
    done = stack.prefect("deployment", "run", "panda-train/default", "--watch", f"--param=conf_path={conf}")
    assert done.returncode == 0, done.stdout + done.stderr
    return flow_run_id(done.stdout)


class TestStack:
    def test_all_services_are_up(self, stack):
        done = stack.panda("status")
        assert done.returncode == 0
        services = [line.split("  ")[0] for line in done.stdout.splitlines()]
        assert services == ["prefect server", "mlflow server", "worker", "watch"]

    def test_up_again_changes_nothing(self, stack):
        before = re.findall(r"pid (\d+)", stack.panda("status").stdout)
        done = stack.panda("up")
        assert done.returncode == 0, done.stderr
        assert "prefect deployment run panda-train/default" in done.stdout
        assert re.findall(r"pid (\d+)", stack.panda("status").stdout) == before

    def test_schedule_is_there_and_paused(self, stack):
        with stack.client() as client:
            schedules = client.read_deployment_by_name("panda-train/default").schedules
        assert [(schedule.slug, schedule.active) for schedule in schedules] == [("weekly", False)]


class TestNobodyElse:
    """Strangers get nothing; what a stranger's request gets is in test_server_guard.py."""

    def test_all_listeners_are_on_loopback(self, stack):
        found = listening(stack.state()["keeper"])
        assert {address for address, _ in found} == {"127.0.0.1"}
        served = {urlsplit(service["base"]).port for service in stack.state()["services"] if service["base"]}
        assert len(served) == 2 and served <= {port for _, port in found}

    def test_strangers_are_refused(self, stack):
        url = stack.env["PREFECT_API_URL"]
        assert http_status(url, "") == http_status(url, "panda:wrong") == 401
        assert http_status(url, stack.auth_string()) == 200
        page = {"Origin": "http://stranger.example"}
        assert httpx.get(f"{url}/health", headers=page).status_code == 403
        assert httpx.get(f"{url}/health", headers={"Host": "stranger.example"}).status_code == 403

    def test_state_and_logs_are_for_their_owner_alone(self, stack):
        state = stack.folder / "state"
        found = [path for path in (state, *state.iterdir()) if path.name != "told.json"]
        assert {path.name: path.stat().st_mode & 0o777 for path in found} == {
            "state": 0o700,
            **dict.fromkeys(
                (
                    "keeper.log",
                    "lock",
                    "mlflow-server.log",
                    "prefect-server.log",
                    "spec.json",
                    "state.json",
                    "watch.log",
                    "worker.log",
                ),
                0o600,
            ),
        }

    def test_the_auth_string_is_written_nowhere_else(self, stack, first):
        secret = stack.auth_string().partition(":")[2]
        files = [path for path in stack.folder.rglob("*") if path.is_file()]
        assert [path.name for path in files if secret.encode() in path.read_bytes()] == ["profiles.toml"]
        assert not [one for one in psutil.process_iter(["cmdline"]) if secret in " ".join(one.info["cmdline"] or [])]


class TestRefusedAtSubmission:
    @pytest.mark.parametrize(
        ("parameter", "message"),
        [
            ("lora_r=0", "0 is less than the minimum of 1"),
            ("strategy=horovod", "'horovod' is not one of ['deepspeed', 'fsdp']"),
            ("lora_rr=4", "not found on the deployment"),
        ],
    )
    def test_wrong_value(self, stack, parameter, message):
        done = stack.prefect("deployment", "run", "panda-train/default", f"--param={parameter}")
        assert done.returncode == 1
        assert message in " ".join((done.stdout + done.stderr).split())

    def test_wrong_combination_fails_at_once_as_on_the_command_line(self, stack):
        conf = stack.config("contradiction", warmup_steps=5, warmup_proportion=0.5)
        run = stack.start(conf)
        state = stack.end_of(run)
        assert (state.type.value, state.name) == ("FAILED", "UserError")
        assert "contradict each other" in state.message
        wait_for(
            lambda: "contradict each other; set one" in stack.logs(run).split("Finished in state")[-1], 60, "its end"
        )
        assert "Traceback" not in stack.logs(run)


class TestRefusedOverTheNetwork:
    """Whoever can start a run by HTTP cannot make it run code, read or write elsewhere, or talk to others."""

    def test_what_only_the_owner_may_say(self, stack, tmp_path):
        pwned = tmp_path / "pwned"
        shell = {"_target_": "subprocess.getoutput", "cmd": f"touch {pwned}"}
        table = {
            "template: builtins.print may not be named": {"template": {"_target_": "builtins.print", "x": shell}},
            "outside of the directories": {"output_dir": "/etc/panda"},
            'allowed_addresses = ["http://127.0.0.1:9"]': {"overrides": ["mlflow_tracking_uri='http://127.0.0.1:9'"]},
            "trust_remote_code=True: not by a parameter": {"overrides": ["trust_remote_code=true"]},
            "is resolved in files of this machine only": {"overrides": ["experiment_name=${oc.env:PATH}"]},
        }
        conf = stack.config("network")
        with stack.client() as client:
            deployment = client.read_deployment_by_name("panda-prepare/default").id  # its runs need not wait in turn
            runs = {
                said: client.create_flow_run_from_deployment(
                    deployment, parameters={"conf_path": conf, **parameters}
                ).id
                for said, parameters in table.items()
            }
            command = {"command": f"touch {pwned}"}
            with pytest.raises(PrefectHTTPStatusError, match="'command' was unexpected"):
                client.create_flow_run_from_deployment(deployment, job_variables=command)
        for said, run in runs.items():
            state = stack.end_of(run)
            assert (state.type.value, state.name) == ("FAILED", "UserError"), said
            assert said in state.message
        assert not pwned.exists() and not stack.outputs("network").exists()

    def test_a_function_of_the_project_and_the_roots_of_the_owner(self, stack):
        """`panda.toml` of this project allows the folder of the test; modules of the project need no line."""
        (stack.project / "my_readers.py").write_text(
            'def capitals(path):\n    return [{"input": "a", "target": "CAPITALS"}] * 2\n'
        )
        reader = {"_target_": "my_readers.capitals"}
        wanted = {"cache_dir": str(stack.folder / "other cache"), "until_stage": "records", "deduplicate": "none"}
        run = stack.start(stack.config("mine", pretraining_data_dir=None), reader=reader, **wanted)
        state = stack.end_of(run)
        assert state.name == "Prepared", state.message
        assert list((stack.folder / "other cache" / "records").iterdir())


class TestRun:
    def test_completed_with_a_message(self, stack, first):
        run = stack.flow_run(first)
        assert run.state.name == "Completed"
        assert "panda-panda-tiny version 1, held-out loss" in run.state.message
        purpose = "panda-tiny on instruction_tuning + pretraining: all weights"
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d {re.escape(purpose)} → version 1, champion", run.name)

    def test_artifacts(self, stack, first):
        shown = stack.artifacts(first)
        assert {"data-report", "prepared-data", "curve-loss", "evaluation", "model", "links", "gate"} <= shown.keys()
        assert "⟦" in shown["prepared-data"]
        assert shown["curve-loss"].startswith("data:image/png;base64,")
        assert "/#/models/panda-panda-tiny/versions/1?workflowType=machine_learning" in shown["links"]
        assert "| records in | 1,907 |" in shown["overview"] and shown["links"].splitlines()[-1] in shown["overview"]

    def test_logs_of_the_ranks_arrive_and_stages_end_with_their_numbers(self, stack, first):
        stack.wait_for_log(first, "Finished in state Completed('6 steps")
        logs = stack.logs(first)
        assert "[rank-0]" in logs and "Completed()" not in logs
        assert re.search(r"Finished in state Completed\('6 steps, [\d,]+ target tokens, loss ", logs)

    def test_second_run_reuses_the_data(self, stack, first):
        run = stack.start(stack.config("short", max_steps=6), until_stage="plan")
        state = stack.end_of(run)
        assert (state.type.value, state.name) == ("COMPLETED", "Prepared")
        with stack.client() as client:
            from prefect.client.schemas.filters import FlowRunFilter

            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run]}))
        names = {task.name: task.state.name for task in tasks}
        assert [names[name] for name in ("validate and shard", "tokenize and mask", "plan packing")] == ["Reused"] * 3


class TestSchedule:
    def test_scheduled_run_has_its_settings(self, stack, first):
        """It finds the corpus of the first run in the outputs that only its file names: old, so it is skipped.

        Also finds out whether the server schedules at all: with SQLAlchemy 2.1 it silently does not.
        """
        conf = stack.config("short", max_steps=6)
        stack.schedule_verb("add", "soon", "--cron", "* * * * *", "--conf_path", conf, "--min_new_target_tokens", "5")
        try:
            stack.schedule_verb("pause", "soon")
            assert stack.panda("up").returncode == 0  # applies prefect.yaml again
            stack.schedule_verb("resume", "soon")
            wait_for(lambda: self.ended(stack), 240, "a scheduled run")
        finally:
            stack.schedule_verb("remove", "soon")
        run = self.ended(stack)[0]
        assert run.parameters == {"conf_path": conf, "min_new_target_tokens": 5}
        assert (run.state.type.value, run.state.name) == ("COMPLETED", "SkippedNoNewData"), run.state.message
        assert "models:/panda-panda-tiny/1" in run.state.message

    def ended(self, stack):
        """One is due every minute: a run that was due while another was at work says nothing here."""
        ended = [run for run in stack.scheduled_runs() if run.state.is_final()]
        return [run for run in ended if run.state.name != "SkippedStillRunning"]


class TestEnds:
    def test_cancel_leaves_no_process_and_a_checkpoint(self, stack, first):
        run = stack.start(stack.config("cancelled", **LONG), until_stage="train")
        run_dir = stack.wait_until_training(run, "cancelled", 3)
        assert len(stack.processes(run)) >= 3  # engine, supervisor, rank
        stack.prefect("flow-run", "cancel", str(run))
        wait_for(lambda: not stack.processes(run), 60, "the end of all processes")
        stack.wait_for_cancelled(run)
        assert list((run_dir / "checkpoints").glob("step-*"))

    def test_killed_flow_is_crashed_and_the_next_run_resumes(self, stack, first):
        run = stack.start(stack.config("killed", **LONG), until_stage="train")
        run_dir = stack.wait_until_training(run, "killed", 12)
        stack.engine(run).send_signal(signal.SIGKILL)
        wait_for(lambda: not stack.processes(run), 40, "the end of all processes")
        assert stack.end_of(run, 120).type.value == "CRASHED"
        again = stack.start(stack.config("killed", **LONG), until_stage="train")
        stack.wait_until_training(again, "killed", 1)
        assert stack.newest_run("killed") == run_dir
        stack.wait_for_log(again, "was not finished: going on with it")
        self.kill_the_worker(stack, again)

    def kill_the_worker(self, stack, run):
        """The run it was at work on ends; a new worker comes up by itself."""
        before = stack.worker_pid()
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: not stack.processes(run), 60, "the end of all processes")
        assert stack.end_of(run, 150).type.value == "CRASHED"
        wait_for(lambda: stack.worker_pid() not in (None, before), 60, "a new worker")

    def test_lost_rank_is_retried_from_the_checkpoint(self, stack, first):
        run = stack.start(stack.config("lost", max_steps=400, save_steps=5, num_processes=2), until_stage="train")
        stack.wait_until_training(run, "lost", 8)
        rank = next(process for process in stack.processes(run) if process.environ().get("RANK") == "1")
        rank.send_signal(signal.SIGKILL)
        state = stack.end_of(run)
        assert (state.type.value, state.name) == ("COMPLETED", "Stopped")
        stack.wait_for_log(run, "resum")


def test_up_again_after_the_process_manager_was_killed(stack):
    """Its services end with it, but not at once: their ports still answer when it is asked whether they are in use."""
    before = stack.state()
    os.kill(before["keeper"], signal.SIGKILL)
    done = stack.panda("up", "--output_dir", str(stack.outputs("short")))
    assert done.returncode == 0, done.stdout + done.stderr
    after = stack.state()
    pids = [{service["pid"] for service in state["services"]} for state in (before, after)]
    assert after["keeper"] != before["keeper"] and len(pids[1]) == 4 and not pids[0] & pids[1]
    assert not any(is_alive(pid) for pid in pids[0])
    assert stack.panda("status").returncode == 0


def test_down_leaves_nothing(stack):
    assert stack.panda("down").returncode == 0
    assert stack.panda("status").returncode == 3
