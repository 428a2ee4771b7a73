"""Fixtures shared by the tests of training."""

from tests.training.mlflow_fixtures import empty_database, output_dir, run_dir

__all__ = ["empty_database", "output_dir", "run_dir"]
