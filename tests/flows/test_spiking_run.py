"""A corpus with garbage in it, through the whole flow: told in the run, left out by the next one.

Flow, MLflow and Prefect server are real; the ranks run in this process.
"""

import json
import random
import string

import pytest

from data_prep.plan.ledger import open_ledger
from data_prep.records.reasons import Reason
from flows.cli.run import call_flow
from tests.flows.test_every_run_is_registered import (  # noqa: F401  # fixtures
    SETTINGS,
    flow_in_this_process,
    ranks_in_this_process,
    save_base,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flow_in_this_process", "ranks_in_this_process")]
BAD_LINES = (41, 127)


@pytest.fixture
def corpus(tmp_path):
    """Counting documents, two of letters by chance."""
    generator = random.Random(0)
    lines = []
    for number in range(1, 201):
        words = [f"{number + i}" for i in range(12)]
        if number in BAD_LINES:
            words = ["".join(generator.choices(string.ascii_letters + "äöüßñ", k=6)) for _ in range(8)]
        lines.append(json.dumps({"title": "count", "content": " ".join(words)}))
    path = tmp_path / "documents" / "counting.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def run(tmp_path, corpus):
    save_base(tmp_path / "base", bos=True)

    def call(**settings):
        return call_flow({
            **SETTINGS, "ckpt_path": str(tmp_path / "base"), "pretraining_data_dir": str(corpus.parent),
            "instruction_tuning_data_dir": None, "output_dir": str(tmp_path / "outputs"),
            "cache_dir": str(tmp_path / "cache"), "quarantine": str(tmp_path / "quarantine.jsonl"),
            "validation_fraction": 0, "packing": False, "num_train_epochs": 2, "max_steps": -1, "learning_rate": 0.003,
            "warmup_steps": 5, "per_gpu_train_batch_size": 4, "save_steps": 1000, "gate_records": 4, **settings,
        })  # fmt: skip

    return call


def test_named_told_and_left_out_by_the_next_run(run, tmp_path, corpus):
    summary = run(on_spike="skip")
    named = {record["line"] for spike in summary["spikes"] for record in spike["records"]}
    assert named == set(BAD_LINES)
    assert summary["training"]["steps_without_update"] == len(summary["spikes"])
    entries = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(entry["record"] for entry in entries) == sorted(f"{corpus}:{line}" for line in BAD_LINES)
    assert all("no update was made" in entry["note"] for entry in entries)
    page = next((tmp_path / "outputs").glob("*/report.html")).read_text()
    assert "Spikes" in page and f"{corpus}:{BAD_LINES[0]}" in page

    again = run(on_spike="skip")
    assert again["data"]["dropped"] == {"quarantined": len(BAD_LINES)} and not again["spikes"]
    ledger = open_ledger(again["data"]["plan_dir"])
    lines = [ledger.entry(row)["line"] for row in range(len(ledger.table)) if ledger.entry(row)["reason"]]
    assert lines == sorted(BAD_LINES) and ledger.entry(BAD_LINES[0] - 1)["reason"] == Reason.QUARANTINED


def test_warned_of_they_stay(run, tmp_path):
    summary = run(on_spike="warn", num_train_epochs=1.5)
    assert summary["spikes"] and summary["training"]["steps_without_update"] == 0
    assert not (tmp_path / "quarantine.jsonl").exists()
