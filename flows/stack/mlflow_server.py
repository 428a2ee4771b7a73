"""MLflow's server on a database that was made whole: `python -m flows.stack.mlflow_server ARGUMENTS`.

In: the arguments of `mlflow server`; the database among them or in MLFLOW_BACKEND_STORE_URI. Out: the server, in this
process.
"""

import os
import sys

from training.tracking.database import make_database
from training.tracking.sync import import_mlflow


def main(arguments: list[str]) -> None:
    """Does not return before the server ends."""
    flag, value = "--backend-store-uri", os.environ.get("MLFLOW_BACKEND_STORE_URI", "")
    import_mlflow()
    make_database(arguments[arguments.index(flag) + 1] if flag in arguments else value)
    from mlflow.cli import cli

    cli(["server", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
