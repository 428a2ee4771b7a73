"""Learning rates, by literal values."""

import pytest

from training.settings import OptimizerSettings
from training.trainer.schedule import schedule, warmup_of


def factors(total: int, **settings) -> list[float]:
    factor = schedule(OptimizerSettings(**settings), total)
    return [round(factor(step), 4) for step in range(total)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("warmup", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.8536, 0.5, 0.1464]),
        ("poly", [0.5, 1, 1, 0.5625, 0.25, 0.0625]),
        ("constant", [1, 1, 1, 1, 1, 1]),
    ],
)
def test_factor_of_every_step(name, expected):
    assert factors(6, lr_scheduler=name, warmup_steps=2) == expected


def test_warmup_as_a_proportion():
    settings = OptimizerSettings(warmup_steps=0, warmup_proportion=0.25)
    assert warmup_of(settings, 10) == 3
    assert factors(4, lr_scheduler="linear", warmup_steps=0, warmup_proportion=0.5) == [0.5, 1, 1, 0.5]


def test_both_warmups_are_refused():
    with pytest.raises(ValueError, match="contradict"):
        OptimizerSettings(warmup_steps=5, warmup_proportion=0.1)


def test_a_target_node():
    node = {"_target_": "users_functions.halving", "start": 4.0}
    assert factors(3, lr_scheduler=node) == [4, 2, 1]
