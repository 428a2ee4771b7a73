"""`panda up`, `panda down`, `panda status`: everything a deployment needs, on this machine, in the background.

In: flags, prefect.toml, PREFECT_API_URL. Out: Prefect server, MLflow server, a worker and a watch, owned by
`process_manager`; state and logs in `.panda/`; deployments and automations on the server. Each can be repeated. A
Prefect server that answers already, or lives on another machine, is used as it is, but not that of another project.
Without a prefect.yaml in the working directory, only the servers. Cost: `up` 11 to 30 s, then 3 s.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from data_prep.errors import PandaError
from flows.stack import listeners, old_database, process_manager, services
from flows.stack.prefect_home import (
    AUTH_STRING,
    URL,
    Address,
    address,
    ensure_profile,
    own_address,
    profiles_path,
    remember,
)
from flows.stack.prefect_server import answers, http_status, unusable
from flows.stack.process_manager import ServiceState, StackState
from training.launch.processes import free_port
from training.tracking.sync import TRAINING_VIEW

START_SECONDS = 300.0
STOP_SECONDS = 60.0
LOG_LINES = 12
MLFLOW_PORT = 5000
CORPUS = "dataset"  # where a run looks that names no other directory

logger = logging.getLogger(__name__)


class StackError(PandaError):
    """A service did not come up, or did not go down."""


def up(argv: list[str]) -> int:
    """Start what is not running, apply prefect.yaml, wait until all of it answers."""
    options = _options("up", "Start Prefect server, MLflow server and worker in the background.", argv)
    state_dir = Path(options.state_dir).absolute()
    there = own_address(options.prefect_port) if options.prefect_port else address()
    if process_manager.is_up(state_dir):
        _check(there)
    else:
        mlflow_port = options.mlflow_port or _mlflow_port(state_dir)
        wanted = _services(there, mlflow_port, Path(options.output_dir).absolute(), state_dir)
        os.environ.update(there.variables())
        process_manager.spawn(state_dir, wanted)
    _wait_for_servers(state_dir, there.url)
    if options.prefect_port:
        remember(there.url)
    usual = _without_environment()
    os.environ.update(there.variables())
    _apply(state_dir)
    print(_welcome(state_dir, there, usual))
    return 0


def _apply(state_dir: Path) -> None:
    """What prefect.yaml declares, onto the server; then the worker is waited for."""
    if not Path("prefect.yaml").exists():
        logger.info("no prefect.yaml here: servers only, no deployments")
        return
    logger.info("servers answer; applying prefect.yaml")
    from flows.stack.deployments import deploy

    deploy()
    _wait_for_worker(state_dir)


def down(argv: list[str]) -> int:
    """End everything `up` started; runs in progress get the time for a checkpoint."""
    state_dir = Path(_options("down", "Stop what `panda up` started.", argv).state_dir).absolute()
    state = process_manager.read_state(state_dir)
    if state is None:
        print("nothing is running")
        return 0
    manager = state["keeper"]
    os.kill(manager, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while process_manager.is_up(state_dir):
        if time.monotonic() > deadline:
            raise StackError(f"the process manager (pid {manager}) is still up after {STOP_SECONDS:.0f} s")
        time.sleep(0.2)
    print("stopped")
    return 0


def status(argv: list[str]) -> int:
    """What runs where, and whether it answers. Exit code 0 when all is well, 3 otherwise."""
    state_dir = Path(_options("status", "Show the services of `panda up`.", argv).state_dir).absolute()
    state = process_manager.read_state(state_dir)
    if state is None:
        print("down (panda up starts everything)")
        return 3
    rows = [(service, condition(service)) for service in state["services"]]
    for service, how in rows:
        print(f"{service['name']:<15} {how:<14} {_vitals(service):<32} {service['address'] or service['log']}")
    return 0 if all(how == "up" for _, how in rows) else 3


def _options(verb: str, text: str, argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"panda {verb}", description=text, allow_abbrev=False)
    parser.add_argument("--state_dir", default=".panda", help="Directory of state and logs [.panda]")
    if verb == "up":
        parser.add_argument("--prefect_port", type=int, help="Port of the Prefect server, remembered [last, or 4200]")
        parser.add_argument("--mlflow_port", type=int, help="Port of the MLflow server, remembered [last, or 5000]")
        parser.add_argument("--output_dir", default="./outputs", help="Where the MLflow database is [./outputs]")
    return parser.parse_args(argv)


def _services(there: Address, mlflow_port: int, output_dir: Path, state_dir: Path) -> list[services.Service]:
    """What is to be started: a Prefect server only where none is and it would be ours."""
    output_dir.mkdir(parents=True, exist_ok=True)
    found = answers(there.url) and not listeners.is_orphan(there.url)
    if found:
        _check(there)
    elif not listeners.is_local(there.url):
        raise StackError(f"no Prefect server answers at {there.url} (PREFECT_API_URL); one on this machine: unset it")
    else:
        old_database.adopt()
    logger.info("%s Prefect server at %s", "using the" if found else "starting a", there.url)
    prefect = [] if found else [services.prefect_server(there.url)]
    mlflow = services.mlflow_server(mlflow_port, output_dir)
    if listeners.listener(mlflow.base) and not listeners.is_orphan(mlflow.base):
        raise StackError(
            f"port {mlflow_port} for MLflow is taken{_whose(mlflow.base)}; {_other_ports(there.url, mlflow_port)}"
        )
    there_are_runs = Path("prefect.yaml").exists()
    runs = [services.worker(mlflow.address, output_dir), services.watch(state_dir)] if there_are_runs else []
    return [*prefect, mlflow, *runs]


def _check(there: Address) -> None:
    """Refuse another project's server; say so when ours takes orders from everybody."""
    reason = unusable(there)
    if reason and answers(there.url):
        raise StackError(f"{reason}; {_other_ports(there.url)}")
    if not reason and listeners.is_local(there.url) and http_status(there.url, "") == 200:
        logger.warning(
            "warning: the Prefect server at %s asks for no auth string (started by hand or by an earlier version): any "
            "program of this machine, perhaps any web page, can use it. `panda down`, then `panda up` ends that.",
            there.url,
        )


def _whose(url: str) -> str:
    project = listeners.project_of(url)
    return f" by {project}" if project else ""


def _other_ports(url: str, mlflow_port: int = MLFLOW_PORT) -> str:
    """What to type when somebody else is there."""
    if not listeners.is_local(url):
        return "PREFECT_API_AUTH_STRING is to hold what it asks for"
    ports = (free_port(listeners.port_of(url)), free_port(mlflow_port))
    return "ports of its own for this project: make up PREFECT_PORT={} MLFLOW_PORT={}".format(*ports)


def _mlflow_port(state_dir: Path) -> int:
    """That of the last time."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        spec = json.loads((state_dir / "spec.json").read_text(encoding="utf-8"))
        return urlsplit(next(one["base"] for one in spec if one["name"] == "mlflow server")).port or MLFLOW_PORT
    return MLFLOW_PORT


def _wait_for_servers(state_dir: Path, url: str) -> None:
    def ready(state: StackState) -> bool:
        return answers(url) and all(answers(service["base"]) for service in state["services"] if service["base"])

    _wait(state_dir, ready)


def _wait_for_worker(state_dir: Path) -> None:
    _wait(state_dir, lambda state: all(service["pid"] for service in state["services"]))
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        _wait(state_dir, lambda _: any(w.status == "ONLINE" for w in client.read_workers_for_work_pool(services.POOL)))


def _wait(state_dir: Path, ready: Any) -> None:
    """Until `ready(state)`; a service that ends before that is named, with the end of its log."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        state = process_manager.read_state(state_dir)
        if state and ready(state):
            return
        ended = [service for service in (state["services"] if state else []) if service["num_exits"] > 1]
        if ended or time.monotonic() > deadline:
            raise StackError(_why_not_up(ended[0] if ended else None, state_dir))
        time.sleep(0.3)


def _why_not_up(service: ServiceState | None, state_dir: Path) -> str:
    if service is None:
        return f"not all is up after {START_SECONDS:.0f} s; panda status shows what is missing, logs are in {state_dir}"
    log = Path(service["log"]).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    last = f"{service['name']} ends with exit code {service['last_exit_code']}; the last lines of {service['log']}:"
    return "\n".join([last, *(f"  {line}" for line in log), "It is started again now and then; panda down ends that."])


def condition(service: ServiceState) -> str:
    """Whether a service of the state runs, and answers."""
    if not service["pid"]:
        return "not running"
    return "up" if not service["base"] or answers(service["base"]) else "does not answer"


def _vitals(service: ServiceState) -> str:
    """Pid, memory and age of a service."""
    try:
        process = psutil.Process(service["pid"])
        family = [process, *process.children(recursive=True)]
        megabytes = sum(member.memory_info().rss for member in family) / 1e6
    except (psutil.NoSuchProcess, TypeError):
        return f"{service['num_exits']} exits, last code {service['last_exit_code']}"
    hours = (time.time() - service["started"]) / 3600
    restarts = f", {service['num_exits']} restarts" if service["num_exits"] else ""
    return f"pid {service['pid']}, {megabytes:.0f} MB, {hours:.1f} h{restarts}"


def _without_environment() -> str:
    """The server that `prefect` finds in this directory by itself."""
    given = os.environ.pop(URL, None)
    url = address().url
    if given is not None:
        os.environ[URL] = given
    return url


def _welcome(state_dir: Path, there: Address, usual: str) -> str:
    """Addresses, how to log in, and what to type next, such that it can be pasted as it is."""
    ours = {service["name"]: service["address"] for service in process_manager.services_of(state_dir)}
    beside = Path(sys.executable).with_name("prefect")
    prefect = "prefect" if shutil.which("prefect") or not beside.exists() else os.path.relpath(beside)
    elsewhere = f"PREFECT_API_URL={there.url} " if usual != there.url else ""
    sample = f"  {os.path.relpath(sys.executable)} -m data_prep.sample {CORPUS}    # a small corpus, as none is there"
    run = ["Next:", *([] if Path(CORPUS).exists() else [sample])]
    run += [f"  {elsewhere}{prefect} deployment run panda-train/default --watch"]
    return "\n".join(
        [
            f"Prefect UI   {there.url.removesuffix('/api')}",
            *_login(there),
            f"MLflow UI    {ours.get('mlflow server')}/#/experiments{TRAINING_VIEW}",
            f"Logs         {os.path.relpath(state_dir)}",
            *(run if Path("prefect.yaml").exists() else ()),
        ]
    )


def _login(there: Address) -> list[str]:
    """What the Prefect UI asks for; shown to a person at a terminal, not to a log."""
    if http_status(there.url, "") != 401:
        return []
    ours = there.auth_string == ensure_profile()[AUTH_STRING]
    where = f"{AUTH_STRING} in {os.path.relpath(profiles_path())}" if ours else f"your {AUTH_STRING}"
    return [
        f"  log in by  {there.auth_string}   ({where})" if ours and sys.stdout.isatty() else f"  log in by  {where}"
    ]
