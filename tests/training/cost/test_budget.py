"""`max_gpu_hours`: when training ends by literal numbers, and two real ranks that end, are killed and go on."""

import json
import shutil
import time

import pytest
import yaml

from tests.support import tiny
from tests.training.trainer.test_resume import of_steps, wait_for_steps
from training import run_files
from training.cost.account import account_of
from training.cost.budget import Budget, stopped_at
from training.cost.marks import DOWN, EVALUATE, LOAD, REPEATED, TRAIN, Mark, end_what_was_killed
from training.settings import CostSettings

NO_TIME = 1e-6
CLOCKS = 0.1  # seconds by which the times of files and of clocks differ
KNOWN = {"hours": 1.0, "devices": 2, "used": 1000.0, "since": 50.0, "loading": 100.0, "evaluation": 20.0}


def test_the_last_step_leaves_time_for_all_that_follows(tmp_path):
    """3600 device-seconds, 1000 of them used: 1300 s of two devices; 720 for six loadings and evaluations."""
    budget = Budget(tmp_path, **KNOWN, stopped_at=None)
    last = 50 + 1300 - 6 * (100 + 20) - 30 - 10
    assert not budget.is_last(7, last, step_seconds=10, checkpoint_seconds=30)
    assert budget.is_last(7, last + 0.01, step_seconds=10, checkpoint_seconds=30)


def test_a_known_end_holds_whatever_the_clock_says(tmp_path):
    budget = Budget(tmp_path, **KNOWN, stopped_at=7)
    assert [budget.is_last(step, 1e9, 10, 30) for step in (6, 7, 8)] == [False, True, True]
    budget.stop(7)
    assert (stopped_at(tmp_path, 1.0), stopped_at(tmp_path, 2.0), stopped_at(tmp_path, None)) == (7, None, None)


def test_hours_of_earlier_starts_count_and_what_took_longest_is_expected_again(tmp_path):
    lines = [
        Mark(time=0, part=LOAD, devices=2), Mark(time=8, part=LOAD), Mark(time=9, part=EVALUATE, step=0),
        Mark(time=13, part=TRAIN, step=0), Mark(time=20, part=DOWN, devices=0), Mark(time=100, part=LOAD, devices=4),
        Mark(time=105, part=EVALUATE, step=3), Mark(time=106, part=TRAIN, step=3), Mark(time=110, devices=0),
    ]  # fmt: skip
    (tmp_path / run_files.TIME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    budget = Budget.of(tmp_path, 1.0, 4)
    assert (budget.used, budget.loading, budget.evaluation) == (2 * 20 + 4 * 10, 9, 4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run without a limit, one that has no time at all, and the latter going on in three ways."""
    root = tmp_path_factory.mktemp("budget")
    settings = {"max_steps": 5, "save_steps": 2, "plan_dir": tiny.write_counting_plan(root / "cache")}
    tiny.train(tiny.write_run(root, "whole", **settings))
    stopped = tiny.write_run(root, "stopped", **settings, max_gpu_hours=NO_TIME)
    tiny.train(stopped)
    for name, step, hours in (("killed", 3, NO_TIME), ("more", 1, 1000.0)):
        run_dir = root / name
        shutil.copytree(stopped, run_dir)
        (run_dir / run_files.TRAINED).unlink()
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        config |= {"max_gpu_hours": hours, "paths": {**config["paths"], "run_dir": str(run_dir)}}
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
        (run_dir / run_files.STOP).write_text(json.dumps({"step": step, "max_gpu_hours": NO_TIME}))
        tiny.train(run_dir, 2, "--resume")
    return root


def trained(runs, name):
    return run_files.read_json(runs / name / run_files.TRAINED)


@pytest.mark.distributed
class TestRanks:
    def test_one_step_is_made_in_any_case_and_its_weights_are_there(self, runs):
        summary = trained(runs, "stopped")
        assert (summary["steps"], summary["total_steps"], summary["exit_reason"]) == (1, 5, "completed")
        assert summary["stopped"] == "max_gpu_hours=1e-06 ended training after step 1 of 5"
        assert run_files.read_json(runs / "stopped" / run_files.STOP) == {"step": 1, "max_gpu_hours": NO_TIME}
        assert (runs / "stopped/model/config.json").exists()
        assert (runs / "stopped/checkpoints/step-000001/complete.json").exists()
        assert of_steps(runs, "stopped") == of_steps(runs, "whole")[:1]

    def test_it_ends_at_the_step_that_the_clock_has_chosen_before(self, runs):
        """Killed before the checkpoint of step 3 was complete, it has no time left now."""
        assert trained(runs, "killed")["steps"] == 3
        assert of_steps(runs, "killed") == of_steps(runs, "whole")[:3]

    def test_with_more_hours_it_goes_on_to_the_end(self, runs):
        summary = trained(runs, "more")
        assert summary["steps"] == 5 and not summary["stopped"]
        assert of_steps(runs, "more") == of_steps(runs, "whole")


@pytest.mark.distributed
def test_what_killed_ranks_have_done_in_vain_is_named(tmp_path):
    run_dir = tiny.write_run(tmp_path, max_steps=40, save_steps=4)
    began = time.time()
    processes = tiny.start(run_dir, 2)
    wait_for_steps(run_dir, 7)
    for process in processes:
        process.kill()
    tiny.wait(processes)
    killed = time.time()
    before = tiny.metrics(run_dir)
    time.sleep(1)
    end_what_was_killed(run_dir, time.time(), is_restart=False)
    tiny.train(run_dir, 2, "--resume")
    account = account_of(run_dir, CostSettings())
    seconds = account["part_seconds"]
    resumed = next(
        one["resumed_from"] for one in run_files.read_lines(run_dir / run_files.TIME) if "resumed_from" in one
    )
    assert len(before) > resumed
    assert seconds[REPEATED] >= sum(line["seconds"] for line in before[resumed:]) - CLOCKS
    assert 1 <= seconds[DOWN] <= account["wall_seconds"] - (killed - began) + CLOCKS
    kept = [line["seconds"] for line in tiny.metrics(run_dir)]
    assert seconds[TRAIN] >= sum(kept) - kept[0] - kept[resumed] - CLOCKS
    assert sum(seconds.values()) == pytest.approx(account["wall_seconds"])
