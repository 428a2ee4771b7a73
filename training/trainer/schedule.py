"""The learning rate of a step: a pure function, so that resuming restores nothing.

In: settings, the step (from 0) and the number of steps. Out: a factor of the peak learning rate::

    warm-up     (step + 1) / warmup_steps: the first update already moves, the last warm-up step reaches the peak
    warmup      1 after warm-up            constant   1 from the first step
    linear      falls straight to 0        cosine     falls along a half cosine to 0        poly   falls as a square
"""

import math
from collections.abc import Callable
from functools import partial

from data_prep.targets import load_target
from training.settings import OptimizerSettings

Factor = Callable[[int], float]  # step, from 0 -> factor of the peak learning rate

DECAYS: dict[str, Callable[[float], float]] = {
    "warmup": lambda done: 1.0,
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "poly": lambda done: (1 - done) ** 2,
}


def warmup_of(settings: OptimizerSettings, total_steps: int) -> int:
    """Steps of warm-up: `warmup_steps`, or `warmup_proportion` of all steps; none for `constant`."""
    if settings.lr_scheduler == "constant":
        return 0
    return settings.warmup_steps or math.ceil(settings.warmup_proportion * total_steps)


def schedule(settings: OptimizerSettings, total_steps: int) -> Factor:
    """The factor as a function of the step. A `_target_` node is called with total_steps and gives that function."""
    if isinstance(settings.lr_scheduler, dict):
        return load_target(settings.lr_scheduler, "lr_scheduler")(total_steps=total_steps)
    warmup = warmup_of(settings, total_steps)
    return partial(_factor, warmup=warmup, total_steps=total_steps, decay=DECAYS[settings.lr_scheduler])


def _factor(step: int, warmup: int, total_steps: int, decay: Callable[[float], float]) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return decay((step - warmup) / max(1, total_steps - warmup))
