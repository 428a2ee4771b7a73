"""Remote files, part by part, as files of this machine: the bounded local cache of a preparation.

In: a `RemoteFile` and a range of it. Out: the path of a local file with these bytes. Below ``<cache_dir>/remote``:

    <fingerprint of address and version>/pieces.json      how it was cut, and the hashes of its pieces
    <fingerprint of address and version>/0-16777216       a range, whole
    <fingerprint of address and version>/0-16777216.part  one on its way: what a killed download left, which goes on

A range is written block by block, each only if the file is still of the version that was listed after it was read; so
parts of two versions are never mixed. Two processes that want the same range wait for each other. A preparation
releases ranges as soon as their records are made (`data_prep.records.files` says how many bytes it holds at most).
Cost: the network; for every 8 MiB a request, and one for the version.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import store
from data_prep.places.address import check_version, read_range

FOLDER = "remote"
PIECES = "pieces.json"
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file somewhere, of one version, and where its bytes may be kept here."""

    address: str
    version: str
    size: int
    cache_dir: str

    @property
    def folder(self) -> Path:
        """What is kept of it."""
        return Path(self.cache_dir) / FOLDER / store.fingerprint(address=self.address, version=self.version)

    def fetch(self, start: int = 0, stop: int | None = None) -> Path:
        """A local file with the bytes ``start:stop``.

        :raises CorpusError: it cannot be read, or is no longer of this version.
        """
        stop = self.size if stop is None else stop
        path = self.folder / f"{start}-{stop}"
        if path.exists():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with _locked(part) as stream:
            if not path.exists():
                self._append(stream, start, stop)
                os.fsync(stream.fileno())
                part.rename(path)
        return path

    def _append(self, stream: Any, start: int, stop: int) -> None:
        """What is not there yet of a range."""
        at = start + stream.seek(0, os.SEEK_END)
        while at < stop:
            block = read_range(self.address, at, min(at + BLOCK_BYTES, stop))
            check_version(self.address, self.version)
            stream.write(block)
            stream.flush()
            at += len(block)

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Remove a range from this machine."""
        (self.folder / f"{start}-{self.size if stop is None else stop}").unlink(missing_ok=True)

    def known(self) -> dict[str, Any]:
        """What is remembered of it: ``cut``, if it was cut, and ``hashes`` of its pieces by range."""
        try:
            known = json.loads((self.folder / PIECES).read_bytes())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def remember(self, **known: Any) -> None:
        """Keep how it was cut, and the hashes, so that it need not be read again to know them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        hashes = {**self.known().get("hashes", {}), **known.pop("hashes", {})}
        whole = {"address": self.address, "version": self.version, **self.known(), **known, "hashes": hashes}
        store.write_atomically(self.folder / PIECES, json.dumps(whole, ensure_ascii=False))


@contextmanager
def _locked(path: Path) -> Iterator[Any]:
    """A file to append to, which no other process appends to meanwhile."""
    while True:
        with open(path, "ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                is_there = os.path.samestat(os.fstat(stream.fileno()), path.stat())
            except FileNotFoundError:
                is_there = False
            if is_there:  # else another has renamed it while this one waited
                yield stream
                return


def remove_stale(cache_dir: Path) -> None:
    """Remove ranges, whole or not, that nobody has written to for a day: of versions that are gone."""
    for path in (Path(cache_dir) / FOLDER).glob("*/*-*"):
        with suppress(FileNotFoundError):  # another preparation has done it
            if time.time() - path.stat().st_mtime > store.STALE_SECONDS:
                path.unlink()
