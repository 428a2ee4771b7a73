"""Metrics of the user's own: called with texts, allowed as every other function, their faults told by name."""

import numpy as np
import pytest
from pydantic import ValidationError

from data_prep.errors import PandaError
from training.comparison.metrics import measures, of_answers
from training.comparison.statistics import Measure
from training.settings import GateSettings

MODULE = """
def words(prompt, answer, target, most=10):
    return min(len(answer.split()), most)

def broken(prompt, answer, target):
    return target[5]
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    name = f"my_{tmp_path.name}"  # a module is imported once in a process
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def settings(target: str, **entry) -> GateSettings:
    return GateSettings(gate_metrics={"mine": {"function": {"_target_": target, **entry}, "higher_is_better": False}})


def test_a_function_sees_prompt_answer_and_target(mine):
    values = of_answers(settings(f"{mine}.words", most=2), [("p", "t"), ("q", "u")], ["a b c", "d"])
    assert values["mine"].tolist() == [2, 1] and values["mine"].dtype == np.float64
    assert measures(settings(f"{mine}.words")) == {"mine": Measure(False, 0.0)}


@pytest.mark.parametrize(
    ("target", "message"),
    [("broken", r"gate_metrics: mine: my_.*broken\(prompt='p', .* failed: IndexError"),
     ("absent", "gate_metrics: mine: cannot import")],
)  # fmt: skip
def test_what_is_wrong_with_one_is_told(mine, target, message):
    with pytest.raises(PandaError, match=message):
        of_answers(settings(f"{mine}.{target}"), [("p", "t")], ["a"])


def test_it_is_allowed_as_every_other_function():
    with pytest.raises(PandaError, match="may not be named by `_target_`"):
        of_answers(settings("subprocess.getoutput"), [("p", "t")], ["a"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [({"fuction": {}}, "its fields are function, higher_is_better"), ({}, "function must be a `_target_` node"),
     ({"function": {}, "max_regression": -1}, "max_regression=-1 must be a number >= 0"),
     ({"function": {}, "higher_is_better": "no"}, "true or false")],
)  # fmt: skip
def test_entries_are_checked(entry, message):
    with pytest.raises(ValidationError, match=message):
        GateSettings(gate_metrics={"mine": entry})
