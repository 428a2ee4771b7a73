"""Directories that `datasets.save_to_disk` wrote: which of their files are the data.

In: the files below a corpus directory, as paths in parts. Out: those that are read. A saved data set is known by its
`state.json` beside a `dataset_info.json`; its rows are in the Arrow files that the former names, and nothing else in
the directory is a corpus. A `DatasetDict` has one of them for every split, and a `dataset_dict.json` above: where that
names several, the run stops, because training on the test split is no accident one wants to find out about later.
Cost: reading these small files.
"""

import json
from collections.abc import Callable
from typing import Any

from data_prep.errors import CorpusError

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
Parts = tuple[str, ...]


def without_bookkeeping(found: set[Parts], read: Callable[[Parts], bytes], root: str) -> set[Parts]:
    """What is left of the files below ``root``.

    :raises CorpusError: a directory of several splits, or one whose files are not all there.
    """
    kept = set(found)
    for place in found:
        folder = place[:-1]
        if place[-1] == SPLITS and _is_saved(found, (*folder, *_splits(read(place))[:1])):
            kept.discard(place)
            _refuse_splits(_splits(read(place)), "/".join((root, *folder)))
        elif place[-1] == STATE and _is_saved(found, folder):
            named = {(*folder, name) for name in _data_files(read(place))}
            if missing := sorted(named - found):
                raise CorpusError(f"{root}: {'/'.join(missing[0])} is missing, which {'/'.join(place)} names")
            kept -= {other for other in found if other[:-1] == folder} - named
    return kept


def _is_saved(found: set[Parts], folder: Parts) -> bool:
    return (*folder, STATE) in found and (*folder, INFO) in found


def _data_files(state: bytes) -> list[str]:
    return [entry["filename"] for entry in _json(state).get("_data_files") or []]


def _splits(content: bytes) -> list[str]:
    return list(_json(content).get("splits") or [])


def _json(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _refuse_splits(splits: list[str], folder: str) -> None:
    if len(splits) > 1:
        choices = ", ".join(f"{folder}/{split}" for split in splits)
        raise CorpusError(f"{folder} holds the splits of a data set; give the one to train on: {choices}")
