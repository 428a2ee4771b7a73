"""Nothing damaged is used: what is reused from the store is read once and compared with its hashes, then known.

In: the directories that a stage is about to reuse. Out: those that differ are set aside with a warning, so that it
makes them again (`set_aside_damaged`), or named in an error where nothing makes them again (`require_intact`). What
has been verified is not read again as long as no file of it has another size, time of change or inode:
``<cache_dir>/verified.json`` keeps a stamp a directory. Cost: first time the disk's speed, by several threads; later a
stat a file.
"""

import json
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep import store
from data_prep.errors import StoreError

VERIFIED = "verified.json"
MAX_NAMED = 10
REPAIR = "panda verify --discard removes what is damaged, and the next preparation makes it again"

logger = logging.getLogger(__name__)


def set_aside_damaged(cache_dir: Path, paths: Iterable[Path]) -> None:
    """Discard the damaged ones among complete directories of the store; what is not there is left to its stage."""
    for path, names in damaged(cache_dir, paths).items():
        logger.warning("%s: damaged (%s); it is made again", path, ", ".join(names))
        store.discard(path)


def require_intact(cache_dir: Path, paths: Iterable[Path]) -> None:
    """:raises StoreError: naming the damaged files and the command that repairs."""
    found = [str(path / name) for path, names in damaged(cache_dir, paths).items() for name in names]
    if found:
        more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
        raise StoreError(f"damaged: {', '.join(found[:MAX_NAMED])}{more}; {REPAIR}")


def damaged(cache_dir: Path, paths: Iterable[Path]) -> dict[Path, list[str]]:
    """The damaged files of each directory that has some; remembers those that are whole."""
    known = _read(cache_dir)
    stamps = {path: _stamp(path) for path in dict.fromkeys(paths) if path.is_dir()}
    unknown = [path for path, stamp in stamps.items() if known.get(_name(path)) != stamp]
    if not unknown:
        return {}
    with ThreadPoolExecutor() as threads:
        found = dict(zip(unknown, threads.map(store.verify, unknown), strict=True))
    whole = {_name(path): stamps[path] for path, names in found.items() if not names}
    if whole:
        _remember(cache_dir, whole)
    return {path: names for path, names in found.items() if names}


def _stamp(path: Path) -> str:
    """Changes when a file is written, replaced, added or removed."""
    stats = {file.name: file.stat() for file in sorted(path.iterdir())}
    facts = [(name, one.st_size, one.st_mtime_ns, one.st_ino) for name, one in stats.items()]
    return store.fingerprint(files=facts)


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _read(cache_dir: Path) -> dict[str, str]:
    try:
        content = json.loads((cache_dir / VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(cache_dir: Path, whole: dict[str, str]) -> None:
    """Add stamps; those of directories that are gone are left out."""
    kept = {name: stamp for name, stamp in _read(cache_dir).items() if (cache_dir / name).is_dir()}
    try:
        store.write_atomically(cache_dir / VERIFIED, json.dumps(kept | whole, indent=0))
    except OSError as error:  # a cache that is only read: verified again next time
        logger.info("%s cannot be written (%s)", cache_dir / VERIFIED, error)
