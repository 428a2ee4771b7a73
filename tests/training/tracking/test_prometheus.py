"""What Prometheus reads while a run trains."""

import json
import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from training.launch.processes import free_port
from training.tracking.prometheus import monitored

STEP = {"event": "step", "step": 3, "steps": 9, "eta_seconds": 60.5, "loss": 2.5, "tokens_per_second": 1000.0}


def scrape(port: int) -> dict[str, tuple[dict, float]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {sample.name: (sample.labels, sample.value) for family in families for sample in family.samples}


def test_the_numbers_of_the_newest_step():
    port = free_port()
    with monitored("week-48", port) as take:
        take(STEP)
        take({**STEP, "step": 4, "loss": 2.25})
        take({"event": "alive", "doing": "saving", "done": 1, "total": 2, "unit": "files"})
        found = scrape(port)
    assert found == {
        "panda_step": ({"run": "week-48"}, 4),
        "panda_steps": ({"run": "week-48"}, 9),
        "panda_eta_seconds": ({"run": "week-48"}, 60.5),
        "panda_loss": ({"run": "week-48"}, 2.25),
        "panda_tokens_per_second": ({"run": "week-48"}, 1000),
    }


def test_only_on_loopback_and_gone_afterwards():
    port = free_port()
    with monitored("week-48", port), socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.2", port)) != 0
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_a_port_in_use_costs_nothing_but_the_numbers(caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with monitored("week-48", port) as take:
            take(STEP)
    assert f"metrics_port={port}" in caplog.text


def test_off_by_default():
    with monitored("week-48", None) as take:
        take(json.loads(json.dumps(STEP)))
