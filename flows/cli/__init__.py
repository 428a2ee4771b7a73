"""The verbs of `panda` and `train.py`. From outside: `main.main`, `main.train_main`."""
