"""How often the ranks are started again."""

import json
import os
import time
from datetime import UTC, datetime

import pytest
from prefect.client.schemas.objects import TaskRun
from prefect.states import Failed

from tasks.train import TrainingFailed, is_worth_another_try
from training.launch.exits import ExitReason
from training.launch.launcher import ExitReport


def asked(run_dir, reason=ExitReason.lost_rank, began=0.0):
    error = TrainingFailed("training", ExitReport(reason), run_dir)
    run = TaskRun(task_key="train", dynamic_key="0", start_time=datetime.fromtimestamp(began, UTC))
    return is_worth_another_try(None, run, Failed(message=str(error), data=error))


def die(run_dir, *times):
    with (run_dir / "time.jsonl").open("a") as file:
        file.writelines(json.dumps({"time": moment, "part": "down"}) + "\n" for moment in times)


def save(run_dir, step, moment):
    directory = run_dir / "checkpoints" / f"step-{step:08d}"
    directory.mkdir(parents=True)
    os.utime(directory, (moment, moment))


def test_three_deaths_without_a_checkpoint_are_enough(tmp_path):
    die(tmp_path, 10, 20)
    assert asked(tmp_path)
    die(tmp_path, 30)
    assert not asked(tmp_path)


def test_each_checkpoint_gives_as_many_again(tmp_path):
    for number in range(1, 30):
        die(tmp_path, 100 * number, 100 * number + 1)
        assert asked(tmp_path)
        save(tmp_path, number, 100 * number + 50)
    now = time.time()
    die(tmp_path, now, now + 1, now + 2)
    assert not asked(tmp_path)


def test_deaths_before_a_person_has_resumed_the_run_do_not_count(tmp_path):
    die(tmp_path, 10, 20, 30)
    assert asked(tmp_path, began=40)


@pytest.mark.parametrize("reason", [ExitReason.data, ExitReason.user_error, ExitReason.non_finite])
def test_a_fault_is_not_tried_again(tmp_path, reason):
    assert not asked(tmp_path, reason)
