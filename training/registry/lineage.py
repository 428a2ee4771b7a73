"""Lineage both ways: what a version was made of, and which versions a record went into, in which steps.

In: the registry (tags, and the artifacts config.yaml, train.json, report/corpus.json of a run) and the plans on this
machine. Out: plain values. Nothing was recorded for this beside the plan: which step trained a row is a function of
(plan, seed, step). A version also saw what its parents saw, the versions whose weights it started from. Cost: a pass
over the ledger of each plan.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow.compute as pc
import yaml

from data_prep import store
from data_prep.errors import CorpusError, PandaError
from data_prep.places.address import absolute, is_address, look
from data_prep.plan.ledger import Ledger, LedgerEntry, open_ledger, records_with
from data_prep.plan.order import position_of, steps_per_epoch
from data_prep.plan.plan_file import open_rows, rows_file
from data_prep.records.build_unit import RECORDS_FILE
from data_prep.records.shard import read_arrow
from training import run_files
from training.registry.versions import Registry, Version
from training.tracking.logged_models import last_step
from training.tracking.tags import (
    CODE_CHANGED_TAG,
    COMMIT_TAG,
    CORPUS_TAG,
    GAIN_TAG,
    GATE_TAG,
    PARENT_TAG,
    PLAN_TAG,
    REASONS_TAG,
    RUN_DIR_TAG,
)

MARKER = "panda_version.json"  # in an exported model: the version it was made from
MAX_RECORDS = 100  # that one text may mean


@dataclass(frozen=True)
class Seen:
    """What a version has to do with a record. `certain` is False where the version's plan is not on this machine."""

    uri: str
    aliases: list[str]
    certain: bool
    trained: bool
    steps: list[int] = field(default_factory=list)  # from 1, as in metrics.jsonl
    through: str | None = None  # the parent that was trained on it
    note: str = ""


@dataclass(frozen=True)
class Found:
    """A record by its content: hash, and the places it has in one plan."""

    hash: str
    places: list[str]
    text: str


def config_of(registry: Registry, version: Version) -> dict[str, Any]:
    """The configuration a version was trained with, {} if its run has none."""
    text = registry.artifact(version, run_files.CONFIG)
    return yaml.safe_load(text) if text else {}


def plan_of(version: Version, config: dict[str, Any], cache_dir: Path | None = None) -> Path | None:
    """The plan a version was trained with, if it is on this machine: where it was then, or in this cache."""
    fingerprint = version.tags.get(PLAN_TAG, "-")
    candidates = [Path(config["paths"]["plan_dir"])] if config else []
    caches = [Path(config["cache_dir"])] if config else []
    candidates += [cache / "plans" / fingerprint for cache in [*caches, *([cache_dir] if cache_dir else [])]]
    return next((path for path in candidates if (path / store.MANIFEST).is_file()), None)


def parent_of(registry: Registry, model_dir: str | None) -> str | None:
    """The version whose weights lie in `model_dir`: the model of a run, an exported one, or files of the registry.

    A checkpoint that was made of another one, with new tokens, has the parent of that one.
    """
    if model_dir is None:
        return None
    manifest = Path(model_dir) / store.MANIFEST
    if manifest.is_file() and (base := run_files.read_json(manifest).get("base")):
        return parent_of(registry, base)
    marker, record = Path(model_dir) / MARKER, Path(model_dir).parent / run_files.TRACKING
    if marker.is_file():
        return run_files.read_json(marker)["version"]
    if record.is_file():
        run_id = run_files.read_json(record)["run_id"]
        version = registry.of_run(run_id) if run_id else None
        return version.uri if version else None
    return _owner_of_files(registry, Path(model_dir))


def _owner_of_files(registry: Registry, model_dir: Path) -> str | None:
    """The registry keeps a logged model under its id, as does the cache of fetched ones."""
    sources = {version.source.removeprefix("models:/"): version.uri for version in registry.versions()}
    return next((sources[part] for part in model_dir.absolute().parts if part in sources), None)


def ancestry(version: Version, versions: list[Version]) -> Iterator[Version]:
    """The version, its parent, and so on, as far as they are still registered."""
    by_uri = {one.uri: one for one in versions}
    while True:
        yield version
        by_uri.pop(version.uri, None)
        parent = by_uri.get(version.tags.get(PARENT_TAG, ""))
        if parent is None:
            return
        version = parent


class CorpusFile(TypedDict):
    """A file of the corpus; an object of a store has a version, a file a hash of its bytes (xxh3_128)."""

    file: str
    bytes: int | None
    version: NotRequired[str | None]
    xxh3: NotRequired[str]


def corpus_files(plan_dir: Path) -> list[CorpusFile]:
    """The files of the corpus behind a plan as they are now: path, bytes, xxh3_128 of the bytes (6 GB/s).

    Of a remote file the address and, for the hash, the version: it is not fetched for this.
    """
    return [_facts(absolute(file)) for file in open_ledger(plan_dir).files()]


def _facts(file: str) -> CorpusFile:
    if is_address(file):
        found = look(file)
        return {"file": file, "bytes": found.size, "version": found.version}
    return {"file": file, "bytes": Path(file).stat().st_size, "xxh3": store.hash_file(file)}


def describe(registry: Registry, version: Version, cache_dir: Path) -> dict[str, Any]:
    """What a version was made of."""
    config = config_of(registry, version)
    plan_dir = plan_of(version, config, cache_dir)
    corpus = registry.json_artifact(version, run_files.CORPUS_REPORT)
    run_tags = registry.client.get_run(version.run_id).data.tags if version.run_id else {}
    return {
        "version": version.uri,
        "aliases": version.aliases,
        "parent": version.tags.get(PARENT_TAG),
        "ancestors": [one.uri for one in ancestry(version, registry.versions())][1:],
        "run_id": version.run_id,
        "run_dir": run_tags.get(RUN_DIR_TAG),
        "code": {"commit": run_tags.get(COMMIT_TAG), "changed": run_tags.get(CODE_CHANGED_TAG)},
        "base": config.get("paths", {}).get("model_dir"),
        "plan": {"fingerprint": version.tags.get(PLAN_TAG), "path": str(plan_dir) if plan_dir else None},
        "corpus": {"fingerprint": version.tags.get(CORPUS_TAG), "files": [_state(file) for file in corpus]},
        "gate": {"result": version.tags.get(GATE_TAG), "reasons": version.tags.get(REASONS_TAG),
                 "gain": version.tags.get(GAIN_TAG)},
        "taken_down": version.taken_down,
        "config": {name: value for name, value in config.items() if name != "paths"},
    }  # fmt: skip


def _state(file: CorpusFile) -> dict[str, Any]:
    """A corpus file as it was, and what became of it."""
    try:
        now = "unchanged" if _facts(file["file"]) == file else "changed"
    except (OSError, CorpusError):
        now = "gone"
    return {**file, "now": now}


def find_record(place: str, registry: Registry, cache_dir: Path) -> list[Found]:
    """The records at FILE:LINE, in the newest plan that knows the file.

    :raises PandaError: no plan has a valid record there.
    """
    problem = f"{place}: no prepared data in {cache_dir}"
    for plan_dir in known_plans(registry, cache_dir):
        try:
            ledger = open_ledger(plan_dir)
            entries = [entry for entry in map(ledger.entry, ledger.at(place)) if entry["hash"]]
        except PandaError as error:
            problem = str(error)
            continue
        if entries:
            return [_found(ledger, entry) for entry in entries]
        problem = f"{place}: the record there was rejected, so no model has seen it"
    raise PandaError(problem)


def known_plans(registry: Registry, cache_dir: Path) -> list[Path]:
    """Plans in the cache, newest first, then those of versions that lie elsewhere."""
    root = cache_dir / "plans"
    found = sorted(store.directories(root), key=lambda path: -path.stat().st_mtime) if root.is_dir() else []
    plans = [plan_of(version, config_of(registry, version), cache_dir) for version in registry.versions()]
    return list(dict.fromkeys([*(path.resolve() for path in found), *(plan.resolve() for plan in plans if plan)]))


def _found(ledger: Ledger, entry: LedgerEntry) -> Found:
    content = entry["hash"]
    assert content is not None, "records without a hash were rejected before"
    same = ledger.with_hash(content).select(["file", "line"]).to_pylist()
    text = "\n".join(ledger.read_texts([entry])[1][0].as_py()) if entry["shard"] >= 0 else ""
    return Found(content.hex(), [f"{one['file']}:{one['line']}" for one in same], text)


def find_text(text: str, cache_dir: Path) -> list[Found]:
    """All prepared records that contain a text.

    :raises PandaError: none, or so many that the text means nothing in particular.
    """
    found: dict[str, Found] = {}
    for unit in store.directories(cache_dir / "records"):
        table = read_arrow(unit / RECORDS_FILE)
        for number in records_with(unit, text).tolist():
            record = table.slice(number, 1).to_pylist()[0]
            content = record["hash"].hex()
            found.setdefault(content, Found(content, [], "\n".join(record["texts"])))
    if not found:
        raise PandaError(f"no prepared record contains {text!r}")
    if len(found) > MAX_RECORDS:
        raise PandaError(f"{len(found)} records contain {text!r}; give more of the text, or FILE:LINE")
    return list(found.values())


def versions_trained_on(registry: Registry, content: str, cache_dir: Path) -> list[Seen]:
    """Every version and what it has to do with the record of this hash; parents are followed."""
    versions = registry.versions()
    direct = {version.uri: _direct(registry, version, content, cache_dir) for version in versions}
    return [_with_parents(version, versions, direct) for version in versions]


def _with_parents(version: Version, versions: list[Version], direct: dict[str, Seen]) -> Seen:
    mine = direct[version.uri]
    if mine.trained:
        return mine
    line = list(ancestry(version, versions))
    for parent in line[1:]:
        if direct[parent.uri].trained:
            return replace(mine, trained=True, certain=True, through=parent.uri)
    unsure = [one.uri for one in line if not direct[one.uri].certain]
    note = f"the plan of its parent {unsure[0]} is not on this machine" if unsure else ""
    return replace(mine, certain=not unsure, note=mine.note or note)


def _direct(registry: Registry, version: Version, content: str, cache_dir: Path) -> Seen:
    config = config_of(registry, version)
    plan_dir = plan_of(version, config, cache_dir)
    if plan_dir is None:
        fingerprint = version.tags.get(PLAN_TAG)
        note = f"its plan {fingerprint} is not on this machine; panda reproduce {version.uri} makes it again"
        return Seen(version.uri, version.aliases, certain=False, trained=False, note=note)
    rows = rows_of_record(plan_dir, content)
    steps = steps_of_rows(plan_dir, rows, config, registry.json_artifact(version, run_files.TRAINED))
    return Seen(version.uri, version.aliases, certain=True, trained=bool(steps), steps=steps)


def rows_of_record(plan_dir: Path, content: str) -> np.ndarray:
    """Training rows that hold a part of the record: ``(n,) int64``, a row as often as it holds one."""
    same = open_ledger(plan_dir).with_hash(bytes.fromhex(content))
    mine = pc.and_(pc.equal(same["verdict"], "accepted"), pc.equal(same["split"], "train"))
    rows = open_rows(plan_dir / rows_file("train"))
    entries = same.filter(mine).select(["shard", "example"]).to_pylist()
    found = [rows.segments_of(entry["shard"], entry["example"])[1] for entry in entries]
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])


def steps_of_rows(plan_dir: Path, rows: np.ndarray, config: dict[str, Any], trained: run_files.Trained) -> list[int]:
    """Optimizer steps, from 1, that trained any of the rows, up to the step whose weights were deployed."""
    if not len(rows):
        return []
    num_rows = open_rows(plan_dir / rows_file("train")).num_rows
    last = last_step(config, trained)
    per_epoch = steps_per_epoch(num_rows, trained["rows_per_step"])
    steps: set[int] = set()
    for epoch in range(-(-last // per_epoch)):
        at = position_of(num_rows, trained["rows_per_step"], config["seed"], epoch, rows)
        steps |= {epoch * per_epoch + int(step) + 1 for step in at}
    return sorted(step for step in steps if step <= last)
