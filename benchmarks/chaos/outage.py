"""Ten minutes without a server, while a scheduled training that nobody looks at steps, ends and wants to register.

In: a seed, which draws the server (Prefect's, MLflow's, both), the moment, and whether its place refuses connections
or takes them and says nothing; or both stay, and the PostgreSQL that they write to is killed. Out: a `Round`: in the
end there is one version, with the losses, gradient norms and weights of the same training undisturbed, schedules are
still obeyed, and after `panda down` no process is left. Cost: 20 minutes, most of them waiting.
"""

import random
import socket
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.chaos.findings import Round
from benchmarks.chaos.kill_ranks import of_steps
from benchmarks.chaos.kill_stack import left_alone, processes_of
from tests.support.postgresql import away, running_server
from tests.support.stack import Stack, wait_for
from training import run_files

SECONDS = 600
AWAY = (("prefect server",), ("mlflow server",), ("prefect server", "mlflow server"))
LATEST_STEP = 150  # of those of `kill_stack`


def outage(seed: int, ground: Path) -> Round:
    """One outage in a training, then the schedule has to bring it to its end."""
    draw, found = random.Random(seed), Round()
    with left_alone(ground / f"outage-{seed}", found) as stack:
        step, is_mute = _wait_for_a_step(stack, draw), draw.random() < 0.5
        names = AWAY[seed % len(AWAY)]
        print(f"    after step {step}: no {' and '.join(names)}, mute: {is_mute}", file=sys.stderr, flush=True)
        threads = [threading.Thread(target=_take_away, args=(stack, name, is_mute)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found.tried += len(names)
    return found


def postgresql_outage(seed: int, ground: Path) -> Round:
    """PostgreSQL dies as by a power cut in a training, and is started again ten minutes later."""
    draw, found = random.Random(seed), Round()
    with running_server() as database:
        for name in ("prefect", "mlflow"):
            database.create(name)
        uris = {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": database.uri("prefect", "asyncpg"),
            "MLFLOW_BACKEND_STORE_URI": database.uri("mlflow"),
        }
        with left_alone(ground / f"postgresql-{seed}", found, **uris) as stack:
            step = _wait_for_a_step(stack, draw)
            print(f"    after step {step}: no PostgreSQL", file=sys.stderr, flush=True)
            with away(database):
                time.sleep(SECONDS)
            found.tried += 1
    return found


def _wait_for_a_step(stack: Stack, draw: random.Random) -> int:
    """A drawn one of the training."""
    step = draw.randrange(1, LATEST_STEP)
    wait_for(lambda: _num_steps(stack) >= step, 600, "a step")
    return step


def _num_steps(stack: Stack) -> int:
    run = stack.newest_run("short")
    return len(of_steps(run)) if run and (run / run_files.METRICS).exists() else 0


def _take_away(stack: Stack, name: str, is_mute: bool) -> None:
    """Kill a server and sit in its place."""
    address = urlsplit(next(service["base"] for service in stack.state()["services"] if service["name"] == name))
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound = False
        while not bound:
            for process in processes_of(stack, name):
                for one in [*process.children(recursive=True), process]:
                    one.kill()
            try:
                place.bind((address.hostname, address.port))
                bound = True
            except OSError:  # it, or the next one, still listens there
                time.sleep(0.05)
        if is_mute:
            place.listen()
        time.sleep(SECONDS)
