"""Versions of registered models: how a run becomes one, which is the champion, what it was made of."""
