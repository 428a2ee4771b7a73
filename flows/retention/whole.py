"""All that there is, put together for the policy.

In: the places of the settings. Out: `Found`: items, what is kept because other output directories use the same cache,
and what could not be looked at, which is then left alone: without the Prefect server no flow run and no unfinished run
of a deployment; with a preparation at work, or a user of the cache whose registry does not answer, nothing of the
cache. Cost: that of its parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_prep import in_use
from data_prep.errors import PandaError
from flows.retention import in_mlflow, in_prefect, on_disk
from flows.retention.policy import MLFLOW_RUN, Item, Key
from training.registry.versions import Registry
from training.settings import TrackingSettings
from training.tracking.database import is_missing
from training.tracking.run import tracking_uri
from training.tracking.sync import away_errors

ELSEWHERE = "used by another output directory"


@dataclass(frozen=True)
class Places:
    """Where to look. `registry`: None where none has been made."""

    output_dir: Path
    cache_dir: Path
    registry: Registry | None


@dataclass
class Found:
    """Items, and what is left alone, in words."""

    items: list[Item] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def look(places: Places, cache_is_free: bool) -> Found:
    """Everything; reads only."""
    found = Found()
    flow_runs = in_prefect.flow_runs()
    if flow_runs is None:
        found.left.append("Prefect's runs, and unfinished runs of its deployments: no server answers (panda up)")
    elif flow_runs.is_own_server:
        found.items += flow_runs.items
    else:
        found.left.append("Prefect's runs: its server is not this project's own (PREFECT_API_URL)")

    def is_open(flow_run: str) -> bool:
        return flow_runs is None or flow_run in flow_runs.open

    mine = in_mlflow.held(places.registry) if places.registry else in_mlflow.Held([], {}, [], {})
    found.items += in_mlflow.items(mine, places.output_dir, places.cache_dir)
    for rank, run in enumerate(on_disk.runs(places.output_dir, is_open)):
        found.items += _run(run, rank, mine, places)
    found.items += _cache(places, found, cache_is_free)
    return found


def _run(run: on_disk.Run, rank: int, mine: in_mlflow.Held, places: Places) -> Iterator[Item]:
    """A run needs its MLflow run and the weights it started from; an unfinished one also what it has registered."""
    needs = in_mlflow.weights_of(run.config, places.cache_dir)
    if run.run_id:
        needs |= {Key(MLFLOW_RUN, run.run_id)} if run.finished else mine.of_run(run.run_id)
    keep = _registered_elsewhere(run, mine, places)
    return on_disk.items_of_run(run, rank, needs, mine.checkpoints_of(run.key.name), keep)


def _registered_elsewhere(run: on_disk.Run, mine: in_mlflow.Held, places: Places) -> str:
    """Versions of it may be in another MLflow than the one that the settings name now: there nobody has looked."""
    here = places.registry.shown_uri if places.registry else ""
    unknown = run.run_id and run.run_id not in mine.runs and run.tracked_in != here
    return f"known to another MLflow ({run.tracked_in})" if unknown else ""


def _cache(places: Places, found: Found, is_free: bool) -> list[Item]:
    if not is_free:
        found.left.append(f"{places.cache_dir}: a preparation is at work there")
        return []
    try:
        others = list(_other_users(places))
    except PandaError as error:
        found.left.append(f"{places.cache_dir}: {error}")
        return []
    return [*on_disk.items_of_cache(places.cache_dir), *others]


def _other_users(places: Places) -> Iterator[Item]:
    """What runs of other output directories need of this cache, and versions in other registries than ours."""
    mine = on_disk.resolved(places.output_dir)
    others = [Path(name) for name in in_use.users(places.cache_dir) if on_disk.resolved(name) != mine]
    for other in [places.output_dir, *others]:
        uris = {_uri(None, other), f"sqlite:///{other / 'mlflow.db'}"}
        for run in on_disk.runs(other, lambda _: True):
            needs = on_disk.data_of(run.config) | in_mlflow.weights_of(run.config, places.cache_dir)
            if other in others:
                yield Item(Key(ELSEWHERE, run.key.name), needs=frozenset(needs), keep=ELSEWHERE)
            uris.add(_uri(run.config.get("mlflow_tracking_uri"), other))
        for uri in uris - {places.registry.uri if places.registry else ""}:
            if not is_missing(uri):
                needs = _needs_of_versions(Registry(uri), places.cache_dir)
                yield Item(Key(ELSEWHERE, f"{other} {uri}"), needs=needs, keep=ELSEWHERE)


def _uri(given: str | None, output_dir: Path) -> str:
    return tracking_uri(TrackingSettings.model_validate({"mlflow_tracking_uri": given}), output_dir)


def _needs_of_versions(registry: Registry, cache_dir: Path) -> frozenset[Key]:
    try:
        return frozenset(in_mlflow.data_of_versions(registry, cache_dir))
    except away_errors() as error:
        raise PandaError(f"the versions in {registry.shown_uri} need data there, and it does not answer") from error
