"""The services operations consist of: Prefect server, MLflow server, worker. What they are called, how they start.

In: addresses and directories. Out: `Service` descriptions, and owned child processes of them. Every child leads a
session of its own, so that it is signalled together with what it starts, and gets SIGTERM when its owner dies, however
that happens. Cost: none; the services need 5 to 20 s to answer.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from flows.stack.listeners import OWNER, port_of
from flows.stack.prefect_home import set_by_user
from training.launch.commands import python_path
from training.launch.processes import LOOPBACK, descendants, die_with_parent, is_alive, is_orphan, marked

POOL = "panda"
WATCH = "watch"
HEARTBEAT = "prefect.flow-run.heartbeat"  # the event that every flow run sends
LEFTOVER_GRACE_SECONDS = 28.0  # a flow run among them may be writing a checkpoint


@dataclass(frozen=True)
class Service:
    """One process of the stack; `base` answers 200 at `/health` when it works, empty where there is none."""

    name: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    address: str = ""  # for people
    base: str = ""  # for health checks


def prefect_server(api_url: str) -> Service:
    """The whole server, with UI and schedules. Its UI has to know the address at which people see it."""
    host, port = urlsplit(api_url).hostname or LOOPBACK[0], str(port_of(api_url))
    env = {"PREFECT_SERVER_API_HOST": host, "PREFECT_SERVER_API_PORT": port}
    env["PREFECT_UI_API_URL"] = set_by_user("PREFECT_UI_API_URL") or api_url
    return Service(
        "prefect server",
        [sys.executable, "-m", "flows.stack.prefect_server", port],
        env,
        f"http://{host}:{port}",
        api_url,
    )


def mlflow_server(port: int, output_dir: Path) -> Service:
    """MLflow on the very database direct runs write to; with MLFLOW_BACKEND_STORE_URI set, on that one.

    Its job executor is ten more processes and 2 GB, for features not used here.
    """
    argv = [sys.executable, "-m", "flows.stack.mlflow_server"]
    argv += ["--host", LOOPBACK[0], "--port", str(port), "--workers", "1"]
    argv += ["--no-serve-artifacts", "--default-artifact-root", str(output_dir / "mlartifacts")]
    if "MLFLOW_BACKEND_STORE_URI" not in os.environ:
        argv += ["--backend-store-uri", _database(output_dir)]
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    address = f"http://{LOOPBACK[0]}:{port}"
    return Service("mlflow server", argv, env, address, address)


def _database(output_dir: Path) -> str:
    """Where direct runs write to."""
    return f"sqlite:///{output_dir / 'mlflow.db'}"


def worker(mlflow_address: str, output_dir: Path) -> Service:
    """A process worker of our pool; it starts every flow run as a process group of its own.

    Runs learn from it that they are to write to the MLflow server when its database is not the one beside them, or
    else where people look at that database, for the links in their artifacts.
    """
    argv = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    if "MLFLOW_BACKEND_STORE_URI" in os.environ:
        env = {"MLFLOW_TRACKING_URI": mlflow_address}
    else:
        env = {"PANDA_MLFLOW_UI": mlflow_address, "PANDA_MLFLOW_DATABASE": _database(output_dir)}
    return Service("worker", [*argv, "--install-policy", "never"], env)


def watch(state_dir: Path) -> Service:
    """Starts crashed runs again and tells people of what does not happen (`flows.watch`)."""
    return Service(WATCH, [sys.executable, "-m", "flows.watch", str(state_dir)])


def start(service: Service, log: Path) -> subprocess.Popen:
    """Start a service as our child, its output appended to its log; what an earlier one left behind is ended first."""
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = f"{log.parent}:{service.name}"
    end_leftovers(owner)
    end_with_us = partial(die_with_parent, signal.SIGTERM, os.getpid())
    with open(log, "ab", opener=private) as output:
        return subprocess.Popen(
            service.argv,
            env={**os.environ, "PYTHONPATH": python_path(), **service.env, OWNER: owner},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_us,  # safe: the owner has one thread  # noqa: PLW1509
        )


def private(path: str, flags: int) -> int:
    """An `opener` of files for their owner alone, also of those an earlier version has left."""
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor


def stop(process: subprocess.Popen, grace_seconds: float) -> None:
    """SIGTERM to the process and what it started, SIGKILL after the grace."""
    family = [process, *descendants(process.pid)]
    if process.poll() is None:
        process.terminate()
    deadline = time.monotonic() + grace_seconds
    while any(is_alive(member.pid) for member in family) and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.05)
    for member in family:
        if is_alive(member.pid):
            member.kill()
    process.wait()


def end_leftovers(owner: str, grace_seconds: float = LEFTOVER_GRACE_SECONDS) -> None:
    """End the orphans of a service that was killed: it may be gone while what it started still serves its port."""
    orphans = []
    for process in marked(OWNER, owner):
        with contextlib.suppress(psutil.Error):
            if is_orphan(process):
                process.terminate()
                orphans.append(process)
    for survivor in psutil.wait_procs(orphans, grace_seconds)[1]:
        survivor.kill()


def stop_engines(worker_pid: int, grace_seconds: float) -> None:
    """SIGTERM to the flow runs a worker has started: they write a checkpoint, report their end and leave.

    The worker itself would kill them at once and leave their runs `Running`.
    """
    engines = [child for child in descendants(worker_pid) if os.getpgid(child.pid) == child.pid]
    for engine in engines:
        engine.terminate()
    psutil.wait_procs(engines, grace_seconds)
