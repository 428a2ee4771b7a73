"""Fixtures shared by the tests of training."""

import pytest

from tests.support.mlflow_fixtures import empty_database, output_dir, run_dir
from tests.support.ranks_here import running_here
from training.launch import launcher
from training.launch.commands import LOAD_BACK

__all__ = ["empty_database", "output_dir", "run_dir"]


@pytest.fixture
def load_back_here(monkeypatch):
    """What is registered is loaded back in this process instead of a child."""
    monkeypatch.setattr(launcher, "run_commands", running_here(LOAD_BACK))
