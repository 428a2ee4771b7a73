"""Numbers of a training for Prometheus and what reads its format, while it runs; off unless `metrics_port` is set.

In: events of the ranks. Out: gauges at http://127.0.0.1:PORT/metrics, labelled with the run:

    panda_step, panda_steps, panda_eta_seconds, panda_eval_loss, and of the newest line of metrics.jsonl panda_loss,
    panda_grad_norm, panda_learning_rate, panda_tokens_per_second, panda_mfu, panda_memory_peak_bytes, ...

Only this machine sees them: a Prometheus elsewhere needs an agent here. Cost: a thread; nothing where it is off.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from training.launch.events import Event
from training.run_files import StepRecord
from training.tracking.looks import only_a_look

NAMES = ("steps", "eta_seconds", "eval_loss", *StepRecord.__annotations__)


@contextlib.contextmanager
def monitored(run_name: str, port: int | None) -> Iterator[Callable[[Event], None]]:
    """What takes the events; a port that cannot be had is a warning."""
    with contextlib.ExitStack() as until_trained:
        gauges: dict[str, Any] = {}
        if port is not None:
            with only_a_look(f"the numbers for Prometheus (metrics_port={port})"):
                gauges = until_trained.enter_context(_served(port))

        def take(event: Event) -> None:
            values: dict[str, Any] = dict(event)
            for name in gauges.keys() & values.keys():
                gauges[name].labels(run_name).set(values[name])

        yield take


@contextlib.contextmanager
def _served(port: int) -> Iterator[dict[str, Any]]:
    """The gauges, by the name of the field that each shows."""
    from prometheus_client import CollectorRegistry, Gauge, start_http_server

    registry = CollectorRegistry()
    server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    try:
        yield {name: Gauge(f"panda_{name}", f"{name} of the training", ["run"], registry=registry) for name in NAMES}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
