"""Train the first steps of a registered version again, from what the registry knows of it, and compare the losses.

In: registry, version, a plan on this machine. Out: `Reproduced`. Rows of a step are a function of plan, seed and step,
and every random number of (seed, step, rows), so on the same kind of machine with the same packages the losses are
equal bit by bit; elsewhere within `TOLERANCE` (other kernels add in another order). Cost: starting the ranks, then the
steps.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import PandaError
from training import run_files
from training.launch import launcher
from training.launch.events import Event
from training.registry.versions import Registry, Version
from training.settings import TrainSettings
from training.tracking.run import environment

TOLERANCE = {"float32": 1e-4, "bf16": 1e-2}  # relative difference of a loss
RUN = "run"


class ReproduceError(PandaError):
    """The version cannot be trained again here: something it was made of is missing or has changed."""


class _EnoughSteps(Exception):
    """Raised in the launcher's callback: it then ends the ranks."""


@dataclass(frozen=True)
class Reproduced:
    """Losses of the same steps, then and now."""

    steps: list[int]
    recorded: list[float]
    again: list[float]
    environment: list[str]  # what is another than it was, in words
    tolerance: float

    @property
    def bitwise(self) -> bool:
        return self.recorded == self.again

    @property
    def largest_difference(self) -> float:
        """Relative to the recorded loss."""
        pairs = zip(self.recorded, self.again, strict=True)
        return max(abs(now - then) / max(abs(then), 1e-12) for then, now in pairs)

    @property
    def agrees(self) -> bool:
        return self.bitwise or self.largest_difference <= self.tolerance


def recorded_losses(registry: Registry, version: Version, num_steps: int) -> dict[int, float]:
    """Step -> loss of the first steps of a version.

    :raises ReproduceError: its run has no metrics.
    """
    lines = map(json.loads, (registry.artifact(version, run_files.METRICS) or "").splitlines())
    losses = {line["step"]: line["loss"] for line in lines if line["step"] <= num_steps}
    if not losses:
        raise ReproduceError(f"{version.uri}: its run {version.run_id} has no {run_files.METRICS} among its artifacts")
    return losses


def reproduce(
    config: dict[str, Any], recorded: dict[int, float], recorded_environment: dict[str, Any],
    cache_dir: Path, on_log: Callable[[str], None],
) -> Reproduced:  # fmt: skip
    """Train as many steps again as `recorded` has. `config`: RUN/config.yaml with paths of this machine.

    Where `max_gpu_hours` has ended the run is known from its losses; the clock is not asked again.
    """
    config = {**config, "max_gpu_hours": None}
    settings = TrainSettings(**{name: config[name] for name in TrainSettings.model_fields if name in config})
    with run_directory(config, cache_dir) as run_dir:
        again = train_first(run_dir, settings, max(recorded), on_log)
    steps = sorted(recorded)
    return Reproduced(
        steps=steps,
        recorded=[recorded[step] for step in steps],
        again=[again[step] for step in steps],
        environment=changes(recorded_environment, environment()),
        tolerance=TOLERANCE["bf16" if settings.precision == "bf16" else "float32"],
    )


@contextmanager
def run_directory(config: dict[str, Any], cache_dir: Path) -> Iterator[Path]:
    """A run directory that is gone afterwards."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".reproduce-", dir=cache_dir) as directory:
        run_dir = (Path(directory) / RUN).absolute()
        run_dir.mkdir()
        content = {**config, "paths": {**config["paths"], "run_dir": str(run_dir)}}
        (run_dir / run_files.CONFIG).write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        yield run_dir


def train_first(
    run_dir: Path, settings: TrainSettings, num_steps: int, on_log: Callable[[str], None]
) -> dict[int, float]:
    """Loss by step; the ranks are ended after `num_steps`, the schedule is that of the whole run.

    :raises ReproduceError: training ended sooner.
    """
    losses: dict[int, float] = {}

    def on_event(event: Event) -> None:
        if event["event"] == "step":
            losses[event["step"]] = event["loss"]
            if event["step"] >= num_steps:
                raise _EnoughSteps

    try:
        report = launcher.launch(run_dir, settings, on_event, on_log)
    except _EnoughSteps:
        return losses
    if len(losses) < num_steps:
        raise ReproduceError(f"training ended after {len(losses)} steps: {report.reason.value}: {report.message}")
    return losses


def num_ranks(config: dict[str, Any], trained: run_files.Trained) -> int:
    """The ranks the version was trained with: the rows of a step must be the same.

    :raises ReproduceError: they were on several machines.
    """
    ranks, rest = divmod(
        trained["rows_per_step"], config["per_gpu_train_batch_size"] * config["gradient_accumulation_steps"]
    )
    if config["nodes"] > 1 or config["hostfile"] or rest:
        raise ReproduceError("it was trained on several machines; reproduce works on one")
    return ranks


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is another in this environment, in words."""
    said = [
        f"{name}: {before.get(name)}, now {now[name]}"
        for name in ("python", "machine")
        if name in before and before[name] != now[name]
    ]
    packages, installed = before.get("packages", {}), now["packages"]
    return said + [
        f"{name} {packages.get(name, 'not installed')}, now {installed.get(name, 'not installed')}"
        for name in sorted({*packages, *installed})
        if packages.get(name) != installed.get(name)
    ]
