"""`panda gc`: what may go of caches, runs, MLflow and Prefect, and taking it away so that what remains is whole."""
