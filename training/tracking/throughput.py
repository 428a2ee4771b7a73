"""What earlier runs tell about the next one: how fast they trained, and with which settings.

In: the output directory, the tracking server if one is named. Out: settings of the newest run; tokens per second of
runs of the same model. Cost: small files of the runs; MLflow is asked (and imported, 2 s) only when no run is here.
"""

import json
import logging
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training import run_files
from training.settings import TrackingSettings, TrainSettings
from training.tracking.redact import what_it_says

logger = logging.getLogger(__name__)

MIN_BYTES = 10_000_000  # of a smaller checkpoint the time is that of its files, not of its bytes
MIN_STEPS = 2
"""The first step of a run is slow; a run of fewer steps says nothing."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second of all ranks together, and whose."""

    tokens_per_second: float
    source: str


def newest_config(output_dir: Path) -> dict[str, Any]:
    """The configuration of the newest run, with its `paths`; empty when there is none."""
    found = sorted(output_dir.glob(f"*/{run_files.CONFIG}"), key=lambda path: path.stat().st_mtime)
    return _read(found[-1]) if found else {}


def past_speed(output_dir: Path, settings: TrainSettings, tracking: TrackingSettings) -> Speed | None:
    """Median speed of the newest run that trained alike: the same model, adapter and number of ranks."""
    for path in sorted(output_dir.glob(f"*/{run_files.CONFIG}"), key=lambda path: path.stat().st_mtime, reverse=True):
        if _alike(_read(path), settings) and (speed := _speed_of(path.parent / run_files.METRICS)):
            return Speed(speed, f"run {path.parent.name}")
    return _from_mlflow(settings, tracking) if tracking.mlflow_tracking_uri else None


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes per second at which a checkpoint was written, all ranks together, and whose."""

    bytes_per_second: float
    source: str


def past_disk_speed(output_dir: Path) -> DiskSpeed | None:
    """That of the newest checkpoint of the runs here which was large enough to tell."""
    markers = output_dir.glob(f"*/{run_files.CHECKPOINTS}/step-*/complete.json")
    for path in sorted(markers, key=lambda path: path.stat().st_mtime, reverse=True):
        marker = run_files.read_json(path)
        size = sum(file["bytes"] for file in marker["files"].values())
        if size >= MIN_BYTES and marker.get("seconds"):
            return DiskSpeed(size / marker["seconds"], f"run {path.parents[2].name}")
    return None


def _alike(config: dict[str, Any], settings: TrainSettings) -> bool:
    names = ("model", "use_lora", "use_quant", "num_processes", "gradient_checkpointing")
    return all(config.get(name) == getattr(settings, name) for name in names)


def _speed_of(metrics: Path) -> float | None:
    if not metrics.is_file():
        return None
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    speeds = [line["tokens_per_second"] for line in lines[1:] if "tokens_per_second" in line]
    return statistics.median(speeds) if len(speeds) >= MIN_STEPS else None


def _from_mlflow(settings: TrainSettings, tracking: TrackingSettings) -> Speed | None:
    """The last speed that a run of the same model logged to the server; None as well where that does not answer."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    from training.tracking.sync import connect

    wanted = f"params.model = '{settings.model}' and params.use_lora = '{json.dumps(settings.use_lora)}'"
    try:
        client = connect(str(tracking.mlflow_tracking_uri))
        experiment = client.get_experiment_by_name(tracking.experiment_name)
        runs = client.search_runs([experiment.experiment_id], wanted, max_results=20) if experiment else []
    except (MlflowException, SQLAlchemyError) as error:
        logger.warning("speeds of earlier runs are not known: %s", what_it_says(error))
        return None
    speeds = ((run.data.metrics.get("tokens_per_second"), run.info.run_name) for run in runs)
    return next((Speed(speed, f"MLflow run {name}") for speed, name in speeds if speed), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
