"""What the gate is to compare: the candidate of a run, the champion of its model, the base it started from.

In: registry, version, run directory. Out: `Job`, written to RUN/gate-job.json for `training.compare`, which asks the
models in a process of its own and needs no MLflow. Cost: requests to MLflow; the champion's files are fetched only
where MLflow does not keep them on this machine.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from training.registry.lineage import config_of, plan_of
from training.registry.versions import Registry, Version

JOB = "gate-job.json"


@dataclass(frozen=True)
class Job:
    """A model is {"name", "model_dir", "template"}; `champion_plan`: what the champion was trained on, if known."""

    gate: dict[str, Any]
    cache_dir: str
    candidate: dict[str, Any]
    champion: dict[str, Any] | None = None
    champion_plan: str | None = None
    base: dict[str, Any] | None = None


def write_job(registry: Registry, version: Version, run_dir: Path, gate: dict[str, Any]) -> None:
    """Write RUN/gate-job.json."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    cache_dir, template = Path(config["cache_dir"]), config["template"]
    champion = registry.champion(version.name)
    if champion and champion.version == version.version:  # tried again after the alias has moved
        champion = None
    base = config["paths"]["model_dir"]
    job = Job(
        gate=gate,
        cache_dir=str(cache_dir),
        candidate={"name": version.uri, "model_dir": str(run_dir / "model"), "template": template},
        champion=_champion(registry, champion, cache_dir, template) if champion else None,
        champion_plan=_plan(registry, champion, cache_dir) if champion else None,
        base=base and {"name": base, "model_dir": base, "template": template},
    )
    (run_dir / JOB).write_text(json.dumps(asdict(job), ensure_ascii=False, indent=1), encoding="utf-8")


def read_job(run_dir: Path) -> Job:
    """RUN/gate-job.json."""
    return Job(**json.loads((run_dir / JOB).read_text(encoding="utf-8")))


def _champion(registry: Registry, champion: Version, cache_dir: Path, template: Any) -> dict[str, Any]:
    config = config_of(registry, champion)
    model_dir = registry.files(champion, cache_dir)
    return {"name": champion.uri, "model_dir": str(model_dir), "template": config.get("template", template)}


def _plan(registry: Registry, champion: Version, cache_dir: Path) -> str | None:
    plan_dir = plan_of(champion, config_of(registry, champion), cache_dir)
    return str(plan_dir) if plan_dir else None
