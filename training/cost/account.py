"""The account of a run: where its wall time went, how long it held devices, their energy and price, the forecast.

In: RUN/time.jsonl, system.jsonl, metrics.jsonl; a price. Out: `Account`, a line of RUN/account.jsonl each time the
run ends. The parts add up to the wall time, for every span between two lines of time.jsonl is of one part. What was not
measured is not there. Cost: the three files once.
"""

import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

from data_prep import store
from training import run_files
from training.cost.marks import EVALUATE, PARTS, REPEATED, SAVE, TRAIN, WAITING, WARM_UP, Mark, read
from training.run_files import read_lines
from training.settings import CostSettings

JOULES_PER_KWH = 3.6e6
SAMPLED_SECONDS = 30.0  # between two samples of the load; a longer gap was not sampled
FIRST_STEPS = 6  # that the forecast is made of


class Price(TypedDict, total=False):
    """Hours of all devices together, and what they cost where a price is given."""

    gpu_hours: float
    rank_hours: float  # of ranks on CPUs
    price: float
    currency: str


class Account(Price, total=False):
    """Since the first start of the run was due."""

    wall_seconds: float
    part_seconds: dict[str, float]  # those of `marks.PARTS` that there were; they add up to the wall time
    goodput: float  # share of training steps, the first ones and lost ones aside, in the time that was not waited
    energy_kwh: float  # of the GPUs, where the power of all that the ranks held was sampled
    forecast_seconds: float  # for the steps that were made, as the first ones of them told
    steps_seconds: float  # that they took


@dataclass(frozen=True)
class Span:
    """A time in which the run did one thing."""

    part: str
    began: float
    ended: float
    devices: int
    step: int | None  # optimizer steps done when it began, where the trainer says so

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def spans(marks: list[Mark], until: float) -> list[Span]:
    """What the run did, without a gap; what a start of the ranks did not find again is named lost."""
    found: list[Span] = []
    part, devices = WAITING, 0
    for one, following in pairwise([*marks, Mark(time=max(until, marks[-1]["time"]))] if marks else []):
        part, devices = one.get("part", part), one.get("devices", devices)
        if "resumed_from" in one:
            found = [_as_lost(span, one["resumed_from"]) for span in found]
        found.append(Span(part, one["time"], following["time"], devices, one.get("step")))
    return found


def _as_lost(span: Span, step: int) -> Span:
    """The span as it counts for a start that goes on after this step, or with nothing (0).

    Training turns to steps after each evaluation and checkpoint, so none of its spans has the checkpoint's step inside.
    """
    if span.step is None:
        return span
    first_lost = step if span.part in (TRAIN, WARM_UP) or not step else step + 1
    is_lost = span.part in (TRAIN, WARM_UP, EVALUATE, SAVE) and span.step >= first_lost
    return replace(span, part=REPEATED) if is_lost else span


def device_seconds(found: Iterable[Span]) -> float:
    """Seconds times devices held."""
    return sum(span.seconds * span.devices for span in found)


def account_of(run_dir: Path, cost: CostSettings) -> Account:
    """The account until now."""
    marks = read(run_dir)
    found = spans(marks, time.time())
    seconds = dict.fromkeys(PARTS, 0.0)
    for span in found:
        seconds[span.part] += span.seconds
    wall = sum(seconds.values())
    at_work = wall - seconds[WAITING]
    account: Account = {
        "wall_seconds": wall,
        "part_seconds": {part: value for part, value in seconds.items() if value},
        "goodput": seconds[TRAIN] / at_work if at_work else 0.0,
        **price_of(device_seconds(found), on_gpus(marks), cost),
    }
    if (energy := energy_kwh(read_lines(run_dir / run_files.SYSTEM), found)) is not None:
        account["energy_kwh"] = energy
    steps = seconds_of_steps(run_dir)
    if (each := seconds_per_step(steps)) is not None:
        account["forecast_seconds"], account["steps_seconds"] = each * len(steps), sum(steps)
    return account


def settle(run_dir: Path, cost: CostSettings) -> Account:
    """The account now, also as a line of RUN/account.jsonl, which MLflow gets."""
    account = account_of(run_dir, cost)
    store.append(run_dir / run_files.ACCOUNT, json.dumps({**account, "time": time.time()}) + "\n")
    return account


def on_gpus(marks: list[Mark]) -> bool:
    """Whether the ranks of the run hold GPUs."""
    return any(one.get("gpus") for one in marks)


def price_of(seconds: float, gpus: bool, cost: CostSettings) -> Price:
    """Of device-seconds."""
    hours = seconds / 3600
    price: Price = {"gpu_hours": hours} if gpus else {"rank_hours": hours}
    if cost.price_per_gpu_hour is not None:
        price |= {"price": hours * cost.price_per_gpu_hour, "currency": cost.currency}
    return price


def energy_kwh(samples: list[dict[str, Any]], found: list[Span]) -> float | None:
    """Of the GPUs while the ranks hold them, which have to be all that are sampled; None = there were no such samples.

    A sample counts for the time since the one before it.
    """
    joules = [
        sum(watts) * seconds
        for before, sample in pairwise(samples)
        if (watts := [value for name, value in sample.items() if name.endswith("_power_usage_watts")])
        and len(watts) == _devices_at(sample["time"], found)
        and (seconds := sample["time"] - before["time"]) <= SAMPLED_SECONDS
    ]
    return sum(joules) / JOULES_PER_KWH if joules else None


def _devices_at(moment: float, found: list[Span]) -> int:
    return next((span.devices for span in found if span.began <= moment < span.ended), 0)


def seconds_of_steps(run_dir: Path) -> list[float]:
    """Of all steps that were kept."""
    return [line["seconds"] for line in read_lines(run_dir / run_files.METRICS)]


def seconds_per_step(steps: list[float]) -> float | None:
    """Median of the first steps but the very first, which is slow; None: there are too few to tell."""
    return statistics.median(steps[1:FIRST_STEPS]) if len(steps) >= FIRST_STEPS else None


def forecast(run_dir: Path, num_steps: int, cost: CostSettings) -> tuple[float, Price] | None:
    """Seconds that all steps will take, and their price; asked while the ranks train. None: it is too early."""
    each, marks = seconds_per_step(seconds_of_steps(run_dir)), read(run_dir)
    if each is None or not marks:
        return None
    seconds = each * num_steps
    return seconds, price_of(seconds * spans(marks, time.time())[-1].devices, on_gpus(marks), cost)
