"""Prefect server, MLflow server and worker on this machine, and the deployments on them."""
