"""A real stack for tests: server, MLflow, worker and deployments, with a database, ports and directories of its own."""

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import yaml

from data_prep.sample import write_sample
from tests.support import warm
from tests.support.prefect_database import new_home
from tests.support.receiver import receiving
from training.launch.processes import free_port

ROOT = Path(__file__).parents[2]
OF_THE_PROJECT = ("deploy", "flows", "prefect.toml", "prefect.yaml", "train.py")
LONG = {"max_steps": 100_000, "save_steps": 5}  # a training that does not end by itself
PATIENCE = 3  # tests share two cores with others; a fault that makes one wait is told later, not less
SETTINGS = {
    "model": "panda-tiny",
    "architecture": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 512},
    "max_seq_length": 64,
    "num_processes": 1,
    "save_steps": 5,
    "gate_records": 20,
    "num_workers": 0,
    "max_restarts": 0,
}


@dataclass
class Stack:
    """What tests do with the stack: by the commands a person types."""

    folder: Path
    env: dict[str, str]

    def panda(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "flows.cli.main", *arguments, "--state_dir", str(self.folder / "state")]
        return self._run(command, timeout)

    def schedule_verb(self, *arguments: str) -> str:
        """`panda schedule ...`; returns what it prints."""
        done = self._run([sys.executable, "-m", "flows.cli.main", "schedule", *arguments], 120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def prefect(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
        return self._run([sys.executable, "-m", "prefect", "--no-prompt", *arguments], timeout)

    @property
    def project(self) -> Path:
        """The working directory of all of it: the files of the project, and a `panda.toml` of the test."""
        return self.folder / "project"

    def _run(self, command: list[str], timeout: float) -> subprocess.CompletedProcess:
        return warm.run(command, self.project, self.env, PATIENCE * timeout)

    def config(self, name: str, **settings: Any) -> str:
        """A configuration file, the value of the parameter conf_path."""
        path = self.folder / f"{name}.yaml"
        places = {
            "instruction_tuning_data_dir": str(self.folder / "dataset" / "instruction_tuning"),
            "pretraining_data_dir": str(self.folder / "dataset" / "pretraining"),
            "output_dir": str(self.outputs(name)),
            "cache_dir": str(self.folder / "cache"),
        }
        path.write_text(yaml.safe_dump({**SETTINGS, **places, **settings}))
        return str(path)

    def outputs(self, name: str) -> Path:
        """Where the runs of a configuration are."""
        return self.folder / "outputs" / name

    def start(self, conf_path: str, deployment: str = "panda-train/default", **parameters: Any) -> UUID:
        """What `prefect deployment run` asks of the server; returns the id of the flow run."""
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            run = client.create_flow_run_from_deployment(found.id, parameters={"conf_path": conf_path, **parameters})
        return run.id

    def cancel(self, flow_run_id: UUID) -> None:
        """What `prefect flow-run cancel` asks of the server."""
        from prefect.states import State, StateType

        with self.client() as client:
            client.set_flow_run_state(flow_run_id, State(type=StateType.CANCELLING))

    def auth_string(self) -> str:
        """What `panda up` has made."""
        profiles = tomllib.loads(Path(self.env["PREFECT_PROFILES_PATH"]).read_text())
        return profiles["profiles"]["panda"]["PREFECT_API_AUTH_STRING"]

    @contextmanager
    def client(self) -> Iterator[Any]:
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

        known = {PREFECT_API_URL: self.env["PREFECT_API_URL"], PREFECT_API_AUTH_STRING: self.auth_string()}
        with temporary_settings(known), get_client(sync_client=True) as client:
            yield client

    def flow_run(self, flow_run_id: UUID) -> Any:
        with self.client() as client:
            return client.read_flow_run(flow_run_id)

    def end_of(self, flow_run_id: UUID, timeout: float = 300) -> Any:
        """The final state."""
        wait_for(lambda: self.flow_run(flow_run_id).state.is_final(), timeout, "the end")  # noqa: PLW0108  # read anew
        return self.flow_run(flow_run_id).state

    def wait_for_cancelled(self, flow_run_id: UUID, timeout: float = 180) -> None:
        """Prefect kills a run that takes more than 30 s to end and calls it crashed, until `flows.watch` has looked."""
        wait_for(lambda: self.flow_run(flow_run_id).state.name == "Cancelled", timeout, "the state Cancelled")

    def logs(self, flow_run_id: UUID) -> str:
        from prefect.client.schemas.filters import LogFilter

        found: list[Any] = []
        with self.client() as client:
            while len(found) % 200 == 0:  # the server gives 200 at once, and a run of many steps says more
                page = client.read_logs(LogFilter(flow_run_id={"any_": [flow_run_id]}), limit=200, offset=len(found))
                if not page:
                    break
                found += page
        return "\n".join(entry.message for entry in found)

    def wait_for_log(self, flow_run_id: UUID, text: str) -> None:
        """Prefect sends what a run logs in batches: the last lines come after its final state."""
        wait_for(lambda: text in self.logs(flow_run_id), 60, f"the log to say {text!r}")

    def artifacts(self, flow_run_id: UUID) -> dict[str, Any]:
        from prefect.client.schemas.filters import ArtifactFilter

        with self.client() as client:
            found = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id={"any_": [flow_run_id]}))
        return {artifact.key: artifact.data for artifact in found}

    def wait_for_state(self, flow_run_id: UUID, name: str, timeout: float = 240) -> None:
        """Until the run is in the state of this name."""

        def reached() -> bool:
            state = self.flow_run(flow_run_id).state
            assert not state.is_final() or state.name == name, f"{state.name}: {state.message}"
            return state.name == name

        wait_for(reached, timeout, f"the state {name}")

    @contextmanager
    def schedule(self, *how: str) -> Iterator[None]:
        """A schedule of panda-train/default, made by the command of the documentation and removed again."""
        name = "panda-train/default"
        done = self.prefect("deployment", "schedule", "create", name, *how, "--timezone", "UTC")
        assert done.returncode == 0, done.stdout + done.stderr
        try:
            yield
        finally:
            with self.client() as client:
                deployment = client.read_deployment_by_name(name)
                for schedule in deployment.schedules:
                    if schedule.slug != "weekly":
                        client.delete_deployment_schedule(deployment.id, schedule.id)

    def scheduled_runs(self) -> list[Any]:
        """Those whose time has come."""
        with self.client() as client:
            runs = client.read_flow_runs()
        return [run for run in runs if "auto-scheduled" in run.tags and run.state.name != "Scheduled"]

    @contextmanager
    def webhook(self, name: str = "test") -> Iterator[tuple[str, list[dict[str, str]]]]:
        """(Name of a notification block, what was sent to it)."""
        with receiving() as (port, received):
            yield self.block(name, port), received

    def block(self, name: str, port: int, path: str = "") -> str:
        """A notification block for a receiver at this port; returns what the setting `notify` calls it."""
        with self.client():
            from prefect.blocks.notifications import CustomWebhookNotificationBlock

            url = f"http://127.0.0.1:{port}/{path}"
            block = CustomWebhookNotificationBlock(
                name=name, url=url, method="POST", json_data={"subject": "{{subject}}", "body": "{{body}}"}
            )
            block.save(name, overwrite=True)
        return f"custom-webhook/{name}"

    def answer(self, flow_run_id: UUID, approve: bool, comment: str = "") -> None:
        """What the form behind the Resume button sends."""
        with self.client() as client:
            client.resume_flow_run(flow_run_id, run_input={"approve": approve, "comment": comment})

    def question(self, flow_run_id: UUID) -> str:
        """The text above the form, which Prefect writes after the state."""
        from prefect.exceptions import PrefectHTTPStatusError

        with self.client() as client:
            keyset = client.read_flow_run(flow_run_id).state.state_details.run_input_keyset

            def text() -> str:
                try:
                    return client.read_flow_run_input(flow_run_id, keyset["description"])
                except PrefectHTTPStatusError:
                    return ""

            wait_for(text, 30, "the text above the form")
            return json.loads(text())

    def engine(self, flow_run_id: UUID) -> psutil.Process:
        """The process of the flow itself."""
        return next(process for process in self.processes(flow_run_id) if "prefect.engine" in process.cmdline())

    @contextmanager
    def default_parameters(self, **parameters: Any) -> Iterator[None]:
        """What runs of panda-train/default get that nobody gives anything, scheduled ones above all."""
        from prefect.client.schemas.actions import DeploymentUpdate

        with self.client() as client:
            deployment = client.read_deployment_by_name("panda-train/default")
            client.update_deployment(deployment.id, DeploymentUpdate(parameters=parameters))
            try:
                yield
            finally:
                client.update_deployment(deployment.id, DeploymentUpdate(parameters={}))

    def wait_until_training(self, flow_run_id: UUID, name: str, steps: int, timeout: float = 240) -> Path:
        """Until so many optimizer steps are done; returns the run directory."""

        def trained() -> bool:
            state = self.flow_run(flow_run_id).state
            assert not state.is_final(), f"{state.name}: {state.message}\n{self.logs(flow_run_id)}"
            return self.processes(flow_run_id) and num_steps(self.newest_run(name)) >= steps

        wait_for(trained, timeout, f"{steps} steps of training")
        return self.newest_run(name)

    def newest_run(self, name: str) -> Path | None:
        runs = sorted(self.outputs(name).glob("*/config.yaml"))
        return runs[-1].parent if runs else None

    def processes(self, flow_run_id: UUID) -> list[psutil.Process]:
        """All processes of a flow run: the engine first."""
        return [process for process in psutil.process_iter() if owner_of(process) == str(flow_run_id)]

    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "state" / "state.json").read_text())

    def worker_pid(self) -> int:
        state = self.state()
        return next(service["pid"] for service in state["services"] if service["name"] == "worker")


def flow_run_id(printed: str) -> UUID:
    """From what `prefect deployment run` prints."""
    line = next(line for line in printed.splitlines() if "UUID:" in line)
    return UUID(line.split("UUID:")[1].strip())


def owner_of(process: psutil.Process) -> str | None:
    """The flow run that a living process belongs to."""
    try:
        zombie = process.status() == psutil.STATUS_ZOMBIE
        return None if zombie else process.environ().get("PREFECT__FLOW_RUN_ID")
    except psutil.Error:
        return None


def listening(pid: int) -> set[tuple[str, int]]:
    """(Address, port) of everything a process and its descendants listen on."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    sockets = [socket for member in family for socket in member.net_connections("inet")]
    return {tuple(socket.laddr) for socket in sockets if socket.status == psutil.CONN_LISTEN}


def num_steps(run: Path | None) -> int:
    metrics = run / "metrics.jsonl" if run else None
    return len(metrics.read_text().splitlines()) if metrics and metrics.exists() else 0


def wait_for(condition: Callable[[], Any], timeout: float, what: str) -> float:
    """Poll twice a second; returns the seconds it took. :param timeout: seconds on a machine that does nothing else"""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < PATIENCE * timeout, f"waited {PATIENCE * timeout} s for {what}"
        time.sleep(0.5)
    return time.monotonic() - started


def new_project(project: Path) -> Path:
    """A working directory in which `train.py` and `prefect.yaml` are ours, and the rest is the test's."""
    project.mkdir()
    for name in OF_THE_PROJECT:
        (project / name).symlink_to(ROOT / name)
    return project


def new_stack(folder: Path) -> Stack:
    """Nothing of it runs yet. Runs may take their configuration from anywhere in the folder of the test."""
    project = new_project(folder / "project")
    (project / "panda.toml").write_text(f'allowed_roots = ["{folder}"]\n')
    env = {
        **os.environ,
        "PREFECT_HOME": str(new_home(folder / "prefect")),
        "PREFECT_PROFILES_PATH": str(folder / "prefect" / "profiles.toml"),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return Stack(folder, env)


@contextmanager
def running_stack(folder: Path, **environment: str) -> Iterator[Stack]:
    """`panda up` beside the sample corpus, and `panda down` at the end, whatever happens."""
    write_sample(folder / "dataset")
    stack = new_stack(folder)
    stack.env.update(environment)
    try:
        outputs = str(stack.outputs("short"))
        done = stack.panda("up", "--mlflow_port", str(free_port()), "--output_dir", outputs)
        assert done.returncode == 0, done.stdout + done.stderr
        yield stack
    finally:
        stack.panda("down")
