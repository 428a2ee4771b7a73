"""Runs and prepared data as items of the policy: what lies below an output directory and in its cache.

In: directories. Out: `Run`s, `Item`s. A run lives while somebody holds its lock, its process is alive, or Prefect has
not ended it. Checkpoints are an item of their own: they go before the run does. Nothing is changed.
Cost: a stat of every file, and the small files of each run.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep import store
from data_prep.errors import PandaError
from flows.retention.policy import (
    BASE,
    CHECKPOINTS,
    FETCHED,
    NEAR_DUPLICATES,
    PLAN,
    RECORDS,
    RUN,
    TOKENIZER,
    TOKENS,
    Item,
    Key,
)
from training import run_files
from training.launch import ownership
from training.tracking import run_record

FETCHED_DIR = "registry"  # in the cache: files of versions whose MLflow keeps them elsewhere
STORES = {"tokenizers": TOKENIZER, "near_duplicates": NEAR_DUPLICATES, "tokens": TOKENS, "plans": PLAN,
          "records": RECORDS, "models": BASE}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run directory and what it says of itself; `config` is empty where it cannot be read."""

    path: Path
    config: dict[str, Any]
    run_id: str | None
    tracked_in: str  # the MLflow it has told of itself, without a password
    live: str
    finished: bool

    @property
    def key(self) -> Key:
        return Key(RUN, resolved(self.path))


def runs(output_dir: Path, is_open: Callable[[str], bool]) -> list[Run]:
    """All runs of an output directory, the newest first.

    :param is_open: whether Prefect has not ended the flow run of this id.
    """
    configs = output_dir.absolute().glob(f"*/{run_files.CONFIG}")
    paths = sorted((path.parent for path in configs if not path.parent.name.startswith(".")), reverse=True)
    return [_run(path, is_open) for path in paths]


def _run(path: Path, is_open: Callable[[str], bool]) -> Run:
    try:
        record = run_record.read(path)
    except PandaError:
        record = None
    owner = str(ownership.owner_of(path).get("flow_run") or "")
    live = ""
    if not ownership.is_free(path) or (record and record.status == run_record.RUNNING and record.is_owner_alive):
        live = "at work"
    finished = (path / run_files.SUMMARY).exists()
    if not live and owner and not finished and is_open(owner):
        live = "its Prefect run has not ended"
    run_id, tracked_in = (record.run_id, record.uri) if record else (None, "")
    return Run(path, read_config(path), run_id, tracked_in, live, finished)


def read_config(run_dir: Path) -> dict[str, Any]:
    """RUN/config.yaml as plain values."""
    try:
        content = yaml.safe_load((run_dir / run_files.CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("paths"), dict) else {}


def items_of_run(run: Run, rank: int, needs: set[Key], ranked: set[Key], keep: str) -> Iterator[Item]:
    """The directory, and its checkpoints, which go before it does.

    :param needs: what the run needs beside its data.
    :param ranked: the checkpoints as MLflow ranks them; they go with the checkpoints.
    :param keep: why the directory stays whatever the run itself says; empty: no such reason.
    """
    made = _last_change(run.path)
    unread = "" if run.config else "its config.yaml cannot be read"
    checkpoints = run.path / run_files.CHECKPOINTS
    in_checkpoints = size_of(checkpoints)
    size = size_of(run.path) - in_checkpoints
    yield Item(run.key, size, made, frozenset(needs) | data_of(run.config), run.live or unread or keep, rank)
    if checkpoints.is_dir():
        keep = run.live or unread or ("the newest run" if rank == 0 else "")
        yield Item(Key(CHECKPOINTS, resolved(checkpoints)), in_checkpoints, made, frozenset({run.key, *ranked}), keep)


def data_of(config: dict[str, Any]) -> frozenset[Key]:
    """Plan, tokenizer, the weights it starts from and the plan it replays, of a configuration."""
    paths = config.get("paths", {})
    named = [(PLAN, paths.get("plan_dir")), (PLAN, config.get("replay_of")), (TOKENIZER, paths.get("tokenizer_dir"))]
    named += [(BASE, paths.get("model_dir"))]
    return frozenset(Key(kind, resolved(place)) for kind, place in named if place)


def items_of_cache(cache_dir: Path) -> Iterator[Item]:
    """Every complete directory of the store, with the shards it is made of; a damaged manifest needs nothing."""
    for name, kind in STORES.items():
        for path in store.directories(cache_dir.absolute() / name):
            yield Item(Key(kind, resolved(path)), size_of(path), path.stat().st_mtime, _needs(kind, path))
    for path in store.directories(cache_dir.absolute() / FETCHED_DIR):
        yield Item(Key(FETCHED, resolved(path)), size_of(path), path.stat().st_mtime)


def _needs(kind: str, path: Path) -> frozenset[Key]:
    if kind not in (PLAN, TOKENS):
        return frozenset()
    try:
        manifest = store.open_manifest(path)
        if kind == PLAN:
            return frozenset(Key(TOKENS, resolved(path / shard)) for shard in manifest["shards"])
        return frozenset({Key(RECORDS, resolved(path.parent.parent / "records" / manifest["records"]))})
    except (PandaError, KeyError, TypeError):
        return frozenset()


def resolved(path: str | Path) -> str:
    return str(Path(path).resolve())


def size_of(path: Path) -> int:
    """Bytes that go with it: of a file with several names (weights are linked into the registry) its share."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                stat = os.lstat(os.path.join(folder, name))
            except OSError:
                continue
            total += stat.st_size // stat.st_nlink
    return total


def _last_change(run_dir: Path) -> float:
    """Of the directory and the files in it; the deeper ones are older than what is written last."""
    return max([run_dir.stat().st_mtime, *(path.stat().st_mtime for path in run_dir.iterdir() if path.is_file())])
