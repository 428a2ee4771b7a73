"""`panda gc`: what may go of caches, runs and MLflow, and taking it away so that what remains is whole."""
