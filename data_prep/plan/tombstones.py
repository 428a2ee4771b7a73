"""Records that were taken down: content hashes that no plan uses any more, wherever and however often they occur.

In and out: a text file of one JSON object a line, readable by people and mergeable by git:

    {"hash": "9f0c...", "record": "dataset/instruction_tuning/a.jsonl:42", "time": "2026-01-31T12:00:00", "note": "..."}

Only `hash` counts: the xxh3_128 of the record's normal form (the `hash` of the ledger). Cost: one small read a plan.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import store
from data_prep.errors import PandaError
from data_prep.plan.duplicates import Known

HASH_DIGITS = 32


def read(path: Path) -> list[str]:
    """The hashes of a file, sorted, each once; none where there is no file.

    :raises PandaError: a line that is no tombstone: a typing error must not bring a record back.
    """
    if not path.exists():
        return []
    lines = enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
    return sorted({_hash_of(path, number, line) for number, line in lines if line.strip()})


def _hash_of(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)["hash"]
        if len(bytes.fromhex(value)) * 2 == HASH_DIGITS:
            return value.lower()
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise PandaError(f'{path}:{number}: not a tombstone; {{"hash": "32 hex digits"}} is expected, found {line[:80]!r}')


def append(path: Path, entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the entries whose hash is not there yet; returns them. Two writers at once wait for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with store.appending(path) as add:
        known = set(read(path))
        new = [entry for entry in entries if entry["hash"] not in known]
        add("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in new))
    store.fsync(path)
    return new


def known(tombstones: list[str]) -> Known:
    """To look records up in."""
    hashes = [np.frombuffer(bytes.fromhex(one), dtype=np.uint8) for one in tombstones]
    return Known(np.array(hashes, dtype=np.uint8).reshape(-1, 16))
