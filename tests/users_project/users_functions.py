"""What a user writes beside a clone and names by `_target_`: readers, templates, a schedule, an optimizer, a callback.

pytest has this directory on its path (pyproject.toml): the packages `tests` and `deploy` themselves may not be named.
"""

import time
from pathlib import Path

import torch


def read_semicolons(path: str, skip: int = 0):
    """A reader."""
    for line in Path(path).read_text().splitlines()[skip:]:
        first, second = line.split(";")
        yield {"input": first, "target": second}


def read_wildly(path: str):
    """A reader of what is no record."""
    pair = {"input": "in", "target": "out"}
    yield from [pair, 5, {"input": object(), "target": "x"}, {"input": "\ud800", "target": "x"}]


def read_and_wait(path: str):
    """A reader that hangs after its first record, and takes every error for one of the network's."""
    yield {"input": "in", "target": "out"}
    for _ in range(3):
        try:
            time.sleep(60)
        except Exception:
            time.sleep(0.1)
    time.sleep(60)


def waiting(record):
    """A template that hangs."""
    while True:
        pass


def failing(record):
    """A template that fails on one record."""
    if record[0]["content"] == "question 3":
        raise KeyError("oops")
    return [(record[0]["content"], False), (record[1]["content"], True)]


def no_text(record):
    return [("a\ud800", True)]


def not_segments(record):
    """A template that yields no text."""
    return [(None, True)]


def marked(record, special):
    """A template with a special token."""
    return [("<|im_start|>", False, special), (record[0]["content"], False), (record[1]["content"], True)]


def upside_down(record, mark="!"):
    """A template: the answer before the question, and a mark after each."""
    texts = {entry["role"]: entry["content"] for entry in record}
    return [(texts["assistant"], True), (mark + texts["user"], False), (mark, True)]


def halving(total_steps: int, start: float):
    """A schedule."""
    return lambda step: start / 2**step


def scaled_sgd(groups, lr, factor):
    """An optimizer."""
    return torch.optim.SGD(groups, lr=lr * factor)


def note(record, path):
    """A callback."""
    with Path(path).open("a") as file:
        file.write(f"{record['step']}\n")
