"""One MLflow run per run: written to the run directory first, sent to MLflow when it answers."""
