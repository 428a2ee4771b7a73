"""Exact resume: on the same number of ranks bitwise, on another number or another engine within 1e-5.

A run that was killed after step 3 is made by copying a finished one without its later checkpoints; the tests at the end
kill real processes.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support import tiny
from tests.training.engines.test_modes import ARCHITECTURE, CONTINUED, LORA, QUANT, weights

pytestmark = pytest.mark.distributed

DROPOUT = {**LORA, "lora_dropout": 0.3}
KINDS = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero3-offload": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    "fsdp": {"strategy": "fsdp"},
    "bf16": {"zero_stage": 2, "precision": "bf16"},
    "bf16-zero3": {"zero_stage": 3, "precision": "bf16"},
    "lora": {**DROPOUT, "zero_stage": 2},
    "lora-zero3": {**DROPOUT, "zero_stage": 3},
    "qlora": {**QUANT, "lora_dropout": 0.3, "zero_stage": 2},
    "lamb": {"optimizer": "LAMB", "zero_stage": 0},
    "adafactor": {"optimizer": "Adafactor", "zero_stage": 0},
    "8bit": {"bit_training": True, "zero_stage": 0},
}
FLOAT32 = [name for name in KINDS if name not in ("bf16", "bf16-zero3", "8bit")]
OTHER_ENGINES = (("zero2", "fsdp"), ("fsdp", "zero3"), ("zero3", "zero0"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Runs of two ranks, resumed on two and on one; a run of one rank, resumed on two; resumed on other engines."""
    root = tmp_path_factory.mktemp("resume")
    plan = tiny.write_counting_plan(root / "cache", num_rows=20)
    writer = Writer(root, plan)
    writer.whole("base", {})
    for name, settings in KINDS.items():
        writer.whole(name, settings)
        writer.resumed(f"{name}-again", settings, source=name)
    for source, target in OTHER_ENGINES:
        writer.resumed(f"{source}-on-{target}", KINDS[target], source=source)
    writer.whole("lora-without-dropout", {**KINDS["lora"], "lora_dropout": 0.0})
    writer.start(ranks=2)
    for name in FLOAT32:
        writer.resumed(f"{name}-on-one", KINDS[name], source=name)
    writer.whole("one", KINDS["zero2"])
    writer.start(ranks=1)
    writer.resumed("one-on-two", KINDS["zero2"], source="one")
    writer.start(ranks=2)
    return root


class Writer:
    """Writes run directories and starts the ranks that do them all."""

    def __init__(self, root: Path, plan: Path):
        self.root, self.plan, self.runs = root, plan, []

    def whole(self, name: str, settings: dict) -> None:
        self._write(name, settings)
        self.runs.append({"run_dir": str(self.root / name)})

    def resumed(self, name: str, settings: dict, source: str) -> None:
        self._write(name, settings)
        copy = {"from": str(self.root / source), "drop": ["step-000006"]}
        self.runs.append({"run_dir": str(self.root / name), "resume": True, "copy": copy})

    def _write(self, name: str, settings: dict) -> None:
        model = (
            {"model_dir": self.root / "base" / "model"} if "use_lora" in settings else {"architecture": ARCHITECTURE}
        )
        tiny.write_run(self.root, name, plan_dir=self.plan, **{**CONTINUED, **model, **settings})

    def start(self, ranks: int) -> None:
        together = self.root / f"start-{time.monotonic_ns()}"
        together.mkdir()
        (together / "config.yaml").write_text(yaml.safe_dump({"runs": self.runs}))
        self.runs = []
        codes = tiny.wait(tiny.start(together, ranks, module="tests.support.many"), seconds=300)
        assert codes == [0] * ranks, tiny.logs(together)


def of_steps(root: Path, name: str) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in tiny.metrics(root / name)]


@pytest.mark.parametrize("name", KINDS)
def test_bitwise_on_the_same_number_of_ranks(root, name):
    assert of_steps(root, f"{name}-again") == of_steps(root, name)
    ours, others = weights(root / f"{name}-again"), weights(root / name)
    assert all(torch.equal(ours[key], others[key]) for key in others)


@pytest.mark.parametrize("name", FLOAT32)
def test_two_ranks_resumed_on_one(root, name):
    assert_close(root, f"{name}-on-one", name)


def test_one_rank_resumed_on_two(root):
    assert_close(root, "one-on-two", "one")


@pytest.mark.parametrize(("source", "target"), OTHER_ENGINES)
def test_resumed_on_another_engine(root, source, target):
    assert_close(root, f"{source}-on-{target}", source)


def assert_close(root: Path, name: str, reference: str) -> None:
    ours, others = of_steps(root, name), of_steps(root, reference)
    assert ours[:3] == others[:3], "kept from before"
    assert [loss for _, loss, _ in ours] == pytest.approx([loss for _, loss, _ in others], rel=1e-5)


def test_dropout_is_in_play(root):
    """Otherwise equal losses of the LoRA runs would prove nothing about random numbers."""
    with_dropout, without = (tiny.losses(tiny.metrics(root / name)) for name in ("lora", "lora-without-dropout"))
    assert with_dropout[1:] != pytest.approx(without[1:], rel=1e-4)


@pytest.fixture
def long_run(tmp_path) -> Path:
    return tiny.write_run(tmp_path, max_steps=40, save_steps=4, keep_last=3)


@pytest.fixture
def expected(long_run) -> list:
    """The same run, not interrupted."""
    whole = tiny.write_run(long_run.parent, "whole", max_steps=40, save_steps=4, keep_last=3)
    tiny.train(whole)
    return of_steps(long_run.parent, "whole")


def wait_for_steps(run_dir: Path, number: int) -> None:
    path = run_dir / "metrics.jsonl"
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) >= number, run_dir)


def wait_until(happened: Callable[[], Any], run_dir: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if happened():
            return
        time.sleep(0.005)
    raise AssertionError(tiny.logs(run_dir))


def test_sigkill_twice_then_resume(long_run, expected):
    for steps, arguments in ((9, []), (23, ["--resume"])):
        processes = tiny.start(long_run, 2, *arguments)
        wait_for_steps(long_run, steps)
        for process in processes:
            process.kill()
        tiny.wait(processes)
    done = len(tiny.metrics(long_run))
    assert done < 40
    tiny.train(long_run, 2, "--resume")
    assert of_steps(long_run.parent, "run") == expected
    assert json.loads((long_run / "train.json").read_text())["first_loss"] == expected[0][1]


def test_sigkill_while_a_checkpoint_is_written(long_run, expected, monkeypatch):
    """What a killed writer has left is no checkpoint; the one before it is resumed, to the same losses."""
    monkeypatch.setenv("PANDA_DISK_BYTES_PER_SECOND", "400000")
    for arguments in ([], ["--resume"]):
        before = len(tiny.metrics(long_run)) if arguments else 0
        processes = tiny.start(long_run, 2, *arguments, module="benchmarks.throttled")
        wait_for_steps(long_run, before + 10)
        wait_until(lambda: list(long_run.glob("checkpoints/.step-*/state-*")), long_run)
        for process in processes:
            process.kill()
        tiny.wait(processes)
    assert len(tiny.metrics(long_run)) < 40
    tiny.train(long_run, 2, "--resume")
    assert of_steps(long_run.parent, "run") == expected
    assert not list(long_run.glob("checkpoints/.step-*")), "leftovers are gone"


def test_killed_before_the_first_checkpoint_and_resumed_on_fewer_ranks(tmp_path):
    """The rows of a step stay those the run began with, though nothing but the start is known."""
    run = tiny.write_run(tmp_path, max_steps=9, save_steps=100)
    processes = tiny.start(run, 2)
    wait_for_steps(run, 3)
    for process in processes:
        process.kill()
    tiny.wait(processes)
    before = of_steps(tmp_path, "run")[:3]
    assert not list((run / "checkpoints").glob("step-*"))
    lines = tiny.train(run, 1, "--resume")
    assert [line["rows"] for line in lines[:4]] == [8, 8, 8, 8]
    assert tiny.losses(lines[:3]) == pytest.approx([loss for _, loss, _ in before], rel=1e-5)


def test_sigterm_of_one_rank_writes_a_checkpoint_and_ends_all(long_run, expected):
    processes = tiny.start(long_run, 2)
    wait_for_steps(long_run, 6)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert tiny.wait(processes) == [80, 80], tiny.logs(long_run)
    done = len(tiny.metrics(long_run))
    assert (long_run / "checkpoints" / f"step-{done:06d}" / "complete.json").exists()
    assert f"stopped after step {done}" in (long_run / "rank-0.log").read_text()
    tiny.train(long_run, 2, "--resume")
    assert of_steps(long_run.parent, "run") == expected
