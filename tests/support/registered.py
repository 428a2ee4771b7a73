"""Versions as a run leaves them, without training: run directory, data, MLflow run, model, version; tiny and real."""

import json
import os
import time
from pathlib import Path
from typing import Any

import yaml

from data_prep import store
from data_prep.plan.reader import open_plan
from tests.support.plans import example, write_plan
from training.registry.lineage import ancestry, config_of, describe, plan_of
from training.registry.versions import CHALLENGER, CHAMPION, Registry, Version
from training.tracking.tags import (
    CHECKPOINT_TAG,
    KEY_TAG,
    PARENT_TAG,
    PLAN_TAG,
    REPLACED_TAG,
    RUN_DIR_TAG,
    RUN_TOKEN_TAG,
)

NAME = "panda-made"
WEIGHTS = "model.safetensors"


def add_made_version(
    output_dir: Path, cache_dir: Path, number: int, parent: Version | None = None, **more: Any
) -> Version:
    """Run NUMBER, which has become a version; a parent is what it started from."""
    registry = Registry(f"sqlite:///{output_dir / 'mlflow.db'}")
    run_dir = add_made_run(output_dir, cache_dir, number, **more)
    client, config = registry.client, run_dir / "config.yaml"
    experiment = client.get_experiment_by_name("made")
    location = (output_dir / "mlartifacts").as_uri()
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("made", location)
    tags = {RUN_TOKEN_TAG: f"token-{number}", RUN_DIR_TAG: str(run_dir)}
    run_id = client.create_run(experiment_id, tags=tags, run_name=run_dir.name).info.run_id
    client.log_artifact(run_id, str(config))
    client.log_metric(run_id, "loss", 1.0 / number)
    model = client.create_logged_model(experiment_id, f"made-{number}", run_id, tags={KEY_TAG: str(number)})
    folder = Path(model.artifact_location.removeprefix("file://")) / "artifacts" / "model"
    folder.mkdir(parents=True)
    os.link(run_dir / "model" / WEIGHTS, folder / WEIGHTS)
    client.finalize_logged_model(model.model_id, "READY")
    if parent is None:
        step = {CHECKPOINT_TAG: str(run_dir / "checkpoints" / "step-000001")}
        ranked = client.create_logged_model(experiment_id, f"made-{number}-step", run_id, tags=step)
        client.finalize_logged_model(ranked.model_id, "READY")
    client.set_terminated(run_id, "FINISHED")
    tracking = {"run_id": run_id, "status": "FINISHED", "sent_status": "FINISHED", "experiment": "made", "uri": ""}
    tracking |= {"run_name": run_dir.name, "params": {}, "tags": {}, "datasets": []}
    (run_dir / "tracking.json").write_text(json.dumps(tracking))
    if not client.search_registered_models(f"name = '{NAME}'"):
        client.create_registered_model(NAME)
    known = {PLAN_TAG: Path(yaml.safe_load(config.read_text())["paths"]["plan_dir"]).name}
    known |= {PARENT_TAG: parent.uri} if parent else {}
    made = client.create_model_version(NAME, f"models:/{model.model_id}", run_id, tags=known, model_id=model.model_id)
    return registry.resolve(f"{NAME}/{made.version}")


def add_made_run(
    output_dir: Path, cache_dir: Path, number: int, *, finished: bool = True, plan: Path | None = None, name: str = ""
) -> Path:
    """A run directory with a plan of its own, whose token shard is shared with the run before or after."""
    run_dir = output_dir / (name or f"run-{number:03}")
    (run_dir / "model").mkdir(parents=True)
    (run_dir / "model" / WEIGHTS).write_bytes(bytes([number]) * 10_000)
    (run_dir / "checkpoints" / "step-000001").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-000001" / "state").write_bytes(bytes(20_000))
    examples = [example([1, 2], [3, 4 + number // 2])] * 3
    plan = plan or write_plan(cache_dir, examples, max_seq_length=8 + number)
    paths = {"plan_dir": str(plan), "tokenizer_dir": None, "model_dir": None, "run_dir": str(run_dir)}
    content = {"cache_dir": str(cache_dir), "paths": paths}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(content))
    if finished:
        (run_dir / "summary.json").write_text("{}")
    return run_dir


def age(folder: Path, days: float) -> None:
    """Everything below it was last changed so many days ago."""
    then = time.time() - days * 24 * 3600
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then))


class MadeProject:
    """Seven versions, 3 to 6 a line of champions, 6 the champion, 7 a challenger; one unfinished run, the newest."""

    def __init__(self, output_dir: Path, cache_dir: Path):
        self.output_dir, self.cache_dir = output_dir, cache_dir
        self.registry = Registry(f"sqlite:///{output_dir / 'mlflow.db'}")
        made: list[Version] = []
        for number in range(1, 8):
            parent = made[-1] if number in (4, 5, 6) else None
            made.append(add_made_version(output_dir, cache_dir, number, parent))
        self.registry.tag(made[5], {REPLACED_TAG: "5"})
        self.registry.set_alias(made[5], CHAMPION)
        self.registry.set_alias(made[6], CHALLENGER)
        add_made_run(output_dir, cache_dir, 8, finished=False)

    def versions(self) -> list[int]:
        return [version.version for version in self.registry.versions(NAME)]

    def runs(self) -> list[int]:
        return [int(path.name[4:]) for path in sorted(self.output_dir.glob("run-*"))]

    def weights(self) -> list[int]:
        return sorted({path.read_bytes()[0] for path in (self.output_dir / "mlartifacts").rglob(WEIGHTS)})

    def check_whole(self) -> None:
        """Whatever is there can be used: versions have their run, configuration and data, runs their plan."""
        versions = self.registry.versions(NAME)
        for version in versions:
            config = config_of(self.registry, version)
            plan_dir = plan_of(version, config, self.cache_dir)
            assert config and plan_dir and open_plan(plan_dir, "train").num_rows == 3
            assert describe(self.registry, version, self.cache_dir)["plan"]["path"] == str(plan_dir)
            assert len(list(ancestry(version, versions))) == {4: 2, 5: 3, 6: 4}.get(version.version, 1)
        for version in (self.registry.resolve(f"{NAME}/{number}") for number in (4, 5, 6, 7)):
            assert (self.registry.files(version, self.cache_dir) / WEIGHTS).read_bytes()[0] == version.version
        for number in (4, 5, 6, 7, 8):
            assert (self.output_dir / f"run-{number:03}" / "model" / WEIGHTS).is_file()
        assert (self.output_dir / "run-008" / "checkpoints" / "step-000001").is_dir()
        assert not store.verify_cache(self.cache_dir).damaged
