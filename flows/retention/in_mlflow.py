"""What MLflow holds, as items of the policy: versions, the models behind them, models of checkpoints, runs.

In: the registry, an output directory, a cache. Out: `Item`s. Only what our runs have made counts (it has our tags);
what runs of other output directories have registered there is kept, with the data it needs here. Nothing is changed.
Cost: a request a version and experiment, and a small artifact a version.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import PandaError
from flows.retention.on_disk import FETCHED_DIR, data_of, resolved, size_of
from flows.retention.policy import FETCHED, MLFLOW_RUN, MODEL, PLAN, RUN, VERSION, Item, Key
from training.comparison.approval import WAITING
from training.registry.lineage import ancestry, config_of, plan_of
from training.registry.proof import local_path
from training.registry.versions import CHAMPION, Registry, Version, pages
from training.tracking.tags import (
    APPROVAL_TAG,
    CHECKPOINT_TAG,
    KEY_TAG,
    PARENT_TAG,
    REPLACED_TAG,
    RUN_DIR_TAG,
    RUN_TOKEN_TAG,
)

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities import Run as MlflowRun


@dataclass(frozen=True)
class Held:
    """All that MLflow has of our runs."""

    versions: list[Version]
    configs: dict[str, dict[str, Any]]  # by the name of a version
    models: "list[LoggedModel]"
    runs: "dict[str, MlflowRun]"

    def checkpoints_of(self, run_dir: str) -> set[Key]:
        """Models of the checkpoints in a run directory."""
        tags = {model.model_id: model.tags.get(CHECKPOINT_TAG, "") for model in self.models}
        return {Key(MODEL, name) for name, place in tags.items() if place and _below(place, Path(run_dir))}

    def of_run(self, run_id: str) -> set[Key]:
        """What a run that is not finished goes on with: its MLflow run, and what it has registered."""
        models = {
            Key(MODEL, one.model_id) for one in self.models if one.source_run_id == run_id and KEY_TAG in one.tags
        }
        versions = {Key(VERSION, one.uri) for one in self.versions if one.run_id == run_id}
        return {Key(MLFLOW_RUN, run_id)} | models | versions


def held(registry: Registry) -> Held:
    """Ask MLflow."""
    from mlflow.entities import ViewType

    client = registry.client
    experiments = [one.experiment_id for one in pages(client.search_experiments, view_type=ViewType.ALL)]
    models = [
        one
        for experiment in experiments
        for one in pages(client.search_logged_models, experiment_ids=[experiment])
        if KEY_TAG in one.tags or CHECKPOINT_TAG in one.tags
    ]
    ours = f"tags.`{RUN_TOKEN_TAG}` LIKE '%'"
    runs = pages(client.search_runs, experiment_ids=experiments, filter_string=ours, run_view_type=ViewType.ALL)
    versions = registry.versions()
    configs = {version.uri: config_of(registry, version) for version in versions}
    return Held(versions, configs, models, {run.info.run_id: run for run in runs})


def items(mine: Held, output_dir: Path, cache_dir: Path) -> Iterator[Item]:
    """Versions, models and runs."""
    yield from _versions(mine, output_dir, cache_dir)
    for model in mine.models:
        foreign = _foreign(mine.runs.get(model.source_run_id or ""), output_dir)
        size = _size(model.artifact_location)
        yield Item(Key(MODEL, model.model_id), size, model.creation_timestamp / 1000, keep=foreign)
    for run_id, run in mine.runs.items():
        ended = (run.info.end_time or run.info.start_time) / 1000
        size = _size(run.info.artifact_uri)
        yield Item(Key(MLFLOW_RUN, run_id), size, ended, keep=_foreign(run, output_dir))


def _versions(mine: Held, output_dir: Path, cache_dir: Path) -> Iterator[Item]:
    """A version with what it needs as an ancestor, and what it needs to be used, rolled back to, or made again."""
    by_uri = {version.uri: version for version in mine.versions}
    back = {
        f"models:/{version.name}/{version.tags[REPLACED_TAG]}"
        for version in mine.versions
        if CHAMPION in version.aliases and REPLACED_TAG in version.tags
    }
    newest_first = sorted(mine.versions, key=lambda version: -version.version)
    ranks: dict[str, int] = {}
    for version in newest_first:
        rank = ranks[version.name] = ranks.get(version.name, -1) + 1
        config, parent = mine.configs[version.uri], version.tags.get(PARENT_TAG, "")
        needs = {Key(MLFLOW_RUN, version.run_id)} | data_of_version(version, config, cache_dir)
        needs |= {Key(VERSION, parent)} if parent in by_uri else set()
        keep = ", ".join(version.aliases) or ("rollback goes back to it" if version.uri in back else "")
        keep = keep or ("waits for approval" if version.tags.get(APPROVAL_TAG) == WAITING else "")
        keep = keep or _foreign(mine.runs.get(version.run_id), output_dir)
        whole = _weights(version, cache_dir) | _run_dir(mine, version) | weights_of(config, cache_dir)
        for ancestor in _made_of(version, mine):
            whole |= _weights(ancestor, cache_dir) | _run_dir(mine, ancestor)
        yield Item(
            Key(VERSION, version.uri), 0, version.created_ms / 1000, frozenset(needs), keep, rank, frozenset(whole)
        )


def _made_of(version: Version, mine: Held) -> Iterator[Version]:
    """The ancestors whose weights `reproduce` starts from: the parent, and through adapters the base of these."""
    for ancestor in list(ancestry(version, mine.versions))[1:]:
        yield ancestor
        if not mine.configs[ancestor.uri].get("use_lora"):
            return


def _weights(version: Version, cache_dir: Path) -> set[Key]:
    model_id = version.source.removeprefix("models:/")
    return {Key(MODEL, model_id), Key(FETCHED, resolved(cache_dir / FETCHED_DIR / model_id))}


def _run_dir(mine: Held, version: Version) -> set[Key]:
    run = mine.runs.get(version.run_id)
    return {Key(RUN, resolved(run.data.tags[RUN_DIR_TAG]))} if run and RUN_DIR_TAG in run.data.tags else set()


def weights_of(config: dict[str, Any], cache_dir: Path) -> set[Key]:
    """The weights that a configuration starts from, where we hold them: a run, a registered model, a fetched one."""
    place = config.get("paths", {}).get("model_dir")
    if not place:
        return set()
    parts, folder = Path(place).absolute().parts, Path(resolved(place))
    fetched = {Key(FETCHED, resolved(cache_dir / FETCHED_DIR / part)) for part in parts}
    return {Key(RUN, str(folder.parent))} | {Key(MODEL, part) for part in parts if part.startswith("m-")} | fetched


def data_of_versions(registry: Registry, cache_dir: Path) -> set[Key]:
    """The data that versions of another output directory need in this cache."""
    found: set[Key] = set()
    for version in registry.versions():
        found |= data_of_version(version, config_of(registry, version), cache_dir)
    return found


def data_of_version(version: Version, config: dict[str, Any], cache_dir: Path) -> set[Key]:
    """What its configuration names, and its plan where it is now."""
    plan_dir = plan_of(version, config, cache_dir)
    return {*data_of(config), *([Key(PLAN, resolved(plan_dir))] if plan_dir else [])}


def _foreign(run: "MlflowRun | None", output_dir: Path) -> str:
    """Why something of a run of another output directory is not ours to free."""
    place = run.data.tags.get(RUN_DIR_TAG, "") if run else ""
    return "" if place and _below(place, output_dir) else "not of this output directory"


def _below(place: str, folder: Path) -> bool:
    return Path(resolved(place)).is_relative_to(resolved(folder))


def _size(location: str) -> int:
    try:
        folder = local_path(location)
    except (PandaError, ValueError):
        return 0
    return size_of(folder) if folder else 0
