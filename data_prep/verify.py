"""Read every byte of prepared data again and compare hashes: what a flipped bit cannot hide from.

In: a cache directory. Out: `Verified`: what was read and the damaged files. Sizes are checked whenever data is read;
this checks contents. A damaged directory that is discarded is built again by the next preparation, alone.
Cost: the disk's; 5 GB/s from memory.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_prep import store

STAGES = ("records", "tokens", "plans", "tokenizers", "near_duplicates")


@dataclass(frozen=True)
class Verified:
    """``damaged`` maps a directory of the store to the names of its damaged files."""

    directories: int
    size_bytes: int
    damaged: dict[str, list[str]]
    discarded: bool


def verify_cache(cache_dir: Path, discard_damaged: bool = False) -> Verified:
    """Hash everything below a cache directory."""
    paths = [path for stage in STAGES for path in store.directories(Path(cache_dir) / stage)]
    with ThreadPoolExecutor() as threads:
        damaged = {
            str(path): names for path, names in zip(paths, threads.map(store.verify, paths), strict=True) if names
        }
    size = sum(file.stat().st_size for path in paths for file in path.iterdir() if file.is_file())
    if discard_damaged:
        for path in damaged:
            store.discard(Path(path))
    return Verified(len(paths), size, damaged, discard_damaged and bool(damaged))
