"""Training the first steps again: equal bit by bit, found out where anything that matters is another."""

import pytest
import yaml

from tests.support.tiny import losses, train, write_run
from training.registry.reproduce import Reproduced, ReproduceError, changes, num_ranks, reproduce
from training.settings import TrainSettings
from training.tracking.run import environment


@pytest.mark.slow
@pytest.mark.distributed
def test_the_same_losses_again_and_others_with_another_seed(tmp_path, monkeypatch):
    """Also of a run that its hours have ended: the steps are known, and the clock is not asked again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_dir = write_run(tmp_path, num_processes=2)
    recorded = dict(enumerate(losses(train(run_dir)), start=1))
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    first = {step: recorded[step] for step in (1, 2, 3)}
    again = reproduce({**config, "max_gpu_hours": 1e-6}, first, environment(), tmp_path / "cache", print)
    assert again.bitwise and again.agrees and again.steps == [1, 2, 3] and again.environment == []
    assert list((tmp_path / "cache").glob(".reproduce-*")) == []
    other = reproduce({**config, "seed": 8}, first, environment(), tmp_path / "cache", print)
    assert not other.agrees and other.largest_difference > other.tolerance


def test_small_differences_agree_and_larger_ones_do_not():
    near = Reproduced([1, 2], [2.0, 4.0], [2.0, 4.0001], [], tolerance=1e-4)
    assert not near.bitwise and near.agrees and near.largest_difference == pytest.approx(2.5e-5)
    assert not Reproduced([1], [2.0], [2.1], [], tolerance=1e-4).agrees


def test_the_number_of_ranks_follows_from_the_rows_of_a_step():
    config = {name: field.default for name, field in TrainSettings.model_fields.items()}
    config |= {"per_gpu_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert num_ranks(config, {"rows_per_step": 24}) == 3
    with pytest.raises(ReproduceError, match="several machines"):
        num_ranks({**config, "nodes": 2}, {"rows_per_step": 16})


def test_what_differs_in_the_environment_is_said():
    before = {"python": "3.11", "machine": "A", "packages": {"torch": "2.13", "numpy": "2.0", "gone": "1"}}
    now = {"python": "3.11", "machine": "B", "packages": {"torch": "2.14", "numpy": "2.0", "new": "1"}}
    assert changes(before, now) == [
        "machine: A, now B",
        "gone 1, now not installed",
        "new not installed, now 1",
        "torch 2.13, now 2.14",
    ]
    assert changes(now, now) == []
