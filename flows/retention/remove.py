"""Taking things away, one after another, so that a kill at any point leaves only what is whole.

In: the items of a `Decision`, in its order. Out: the number of those that went. A directory is renamed first, so nobody
opens half of it; what a killed sweep has left under such a name goes first. Before a run directory goes its lock is
taken, before a version its aliases are looked at again: what has come to life meanwhile stays. A database of MLflow
loses the rows for good; a server offers only to mark them as deleted, and `mlflow gc` where it runs does the rest.
Cost: a rename and the file system's time for a directory, some requests for the rest.
"""

import contextlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep import store
from flows.retention import in_prefect
from flows.retention.on_disk import FETCHED_DIR
from flows.retention.policy import (
    CHECKPOINTS,
    FETCHED,
    FLOW_RUN,
    MLFLOW_RUN,
    MODEL,
    RUN,
    VERSION,
    Decision,
    Item,
)
from flows.retention.whole import Places
from training.launch import ownership
from training.registry.proof import local_path
from training.registry.versions import Registry, Version
from training.tracking.sync import ARTIFACTS_DIR
from training.tracking.tags import WEIGHTS_FREED_TAG

FREED = ".freed-"  # a folder beside, that a directory is moved into before its files go
GONE = "RESOURCE_DOES_NOT_EXIST"

logger = logging.getLogger(__name__)


def free(decision: Decision, places: Places) -> list[Item]:
    """All that is to go; returns what went."""
    artifacts = places.output_dir / ARTIFACTS_DIR
    in_cache = [places.cache_dir / name for name in (FETCHED_DIR, *store.STAGES)]
    for root in [places.output_dir, artifacts, artifacts / "models", *in_cache]:
        sweep_leftovers(root)
    with contextlib.ExitStack() as stack:
        sweep = Sweep(decision, places, stack)
        return [item for item in decision.freed if sweep.remove(item)]


class Sweep:
    """How each kind goes; clients are made when the first one of their kind does."""

    def __init__(self, decision: Decision, places: Places, stack: contextlib.ExitStack):
        self.decision, self.places, self.stack = decision, places, stack

    def remove(self, item: Item) -> bool:
        """Whether it went."""
        kind, name = item.key
        if kind in (RUN, CHECKPOINTS):
            return remove_of_run(Path(name), Path(name) if kind == RUN else Path(name).parent)
        if kind in (VERSION, MODEL, MLFLOW_RUN):
            return self.mlflow.remove(kind, name)
        if kind == FLOW_RUN:
            in_prefect.remove(self.prefect, name)
        elif kind == FETCHED:
            move_away(Path(name))
        else:
            store.discard(Path(name))
        return True

    @cached_property
    def prefect(self) -> Any:
        from prefect.client.orchestration import get_client

        return self.stack.enter_context(get_client(sync_client=True))

    @cached_property
    def mlflow(self) -> "Mlflow":
        assert self.places.registry, "what goes was found there"
        return Mlflow(self.places.registry, self.decision.thin)


def remove_of_run(path: Path, run_dir: Path) -> bool:
    """A run directory, or what lies in it, unless somebody has taken it meanwhile."""
    try:
        descriptor = os.open(run_dir / ownership.LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return True
    try:
        if not store.try_lock(descriptor):
            logger.info("%s is in use again: kept", run_dir)
            return False
        move_away(path, beside=run_dir)
        return True
    finally:
        os.close(descriptor)


def move_away(path: Path, beside: Path | None = None) -> None:
    """Rename a directory into a folder of the same disk where nobody looks, then delete it."""
    if not path.is_dir():
        return
    folder = (beside or path).with_name(f"{FREED}{secrets.token_hex(8)}")
    folder.mkdir(mode=0o700)
    with contextlib.suppress(FileNotFoundError):
        path.rename(folder / path.name)
    shutil.rmtree(folder, ignore_errors=True)


def sweep_leftovers(root: Path) -> None:
    """What a killed sweep has renamed and not deleted."""
    for path in root.glob(f"{FREED}*"):
        shutil.rmtree(path, ignore_errors=True)
    if root.name in store.STAGES:
        store.remove_stale(root)


@contextlib.contextmanager
def gone_is_gone() -> Iterator[None]:
    """What another sweep or a person has deleted meanwhile is as good as deleted."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != GONE:
            raise


class Mlflow:
    """Deletions in one MLflow."""

    def __init__(self, registry: Registry, thin: set[str]):
        self.registry, self.thin = registry, thin

    def remove(self, kind: str, name: str) -> bool:
        """Whether it went."""
        with gone_is_gone():
            return {VERSION: self._version, MODEL: self._model, MLFLOW_RUN: self._run}[kind](name)
        return True

    def _version(self, uri: str) -> bool:
        version = self.registry.resolve(uri)
        if version.aliases:
            logger.info("%s has an alias now: kept", uri)
            return False
        self.registry.client.delete_model_version(version.name, str(version.version))
        return True

    def _model(self, model_id: str) -> bool:
        """A logged model and its files; the version that it belongs to says first that they are gone."""
        owner = next((one for one in self.registry.versions() if one.source == f"models:/{model_id}"), None)
        if owner and not self._may_lose_weights(owner):
            return False
        client, database = self.registry.client, self._database()
        model = (database or client).get_logged_model(model_id, **({"allow_deleted": True} if database else {}))
        self._forget_files(model.artifact_location, model_id)
        if str(model.status) != "DELETED":
            with gone_is_gone():
                client.delete_logged_model(model_id)
        if database:
            database._hard_delete_logged_model(model_id)
        return True

    def _may_lose_weights(self, owner: Version) -> bool:
        if owner.uri not in self.thin or owner.aliases:
            logger.info("%s is in use: its weights are kept", owner.uri)
            return False
        self.registry.tag(owner, {WEIGHTS_FREED_TAG: time.strftime("%Y-%m-%dT%H:%M:%S")})
        return True

    def _run(self, run_id: str) -> bool:
        client, database = self.registry.client, self._database()
        run = client.get_run(run_id)
        self._forget_files(run.info.artifact_uri, run_id)
        if run.info.lifecycle_stage == "active":
            client.delete_run(run_id)
        if database:
            database._hard_delete_run(run_id)
        return True

    def _database(self) -> Any:
        """MLflow's store where it is a database, which alone can delete for good: what `mlflow gc` does with it."""
        if self.registry.uri.startswith(("http://", "https://")):
            return None
        from mlflow.tracking._tracking_service.utils import _get_store

        return _get_store(self.registry.uri)

    def _forget_files(self, location: str, owner: str) -> None:
        """Where they are on this machine, with the folder that bears the owner's name; else as MLflow deletes them."""
        folder = local_path(location)
        if folder:
            move_away(folder.parent if folder.parent.name == owner else folder)
            return
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        get_artifact_repository(location).delete_artifacts()
