"""Fixtures shared by the tests of training."""

from tests.support.mlflow_fixtures import empty_database, output_dir, run_dir

__all__ = ["empty_database", "output_dir", "run_dir"]
