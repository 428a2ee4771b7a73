"""Checkpoints that are made of others before a training starts: a base and a delta, a model and new tokens."""
