"""The content-addressed store: every result of a stage is a directory named by what it was made from.

In: a fingerprint and a function that writes files. Out: ``root/<fingerprint>/`` with those files and ``manifest.json``,
there completely or not at all, whatever is killed and however many builders run at once.

    root/.building-<fingerprint>-<host>-<random>/   while it is written; its builder holds an flock on the directory
                                             itself, so the next builder on this host sees which of these belong to dead
                                             processes (on network file systems such locks are seen on one host only)
    root/<fingerprint>/manifest.json         {"format_version", "files": {name: {"bytes", "xxh3"}}, ..., "xxh3"}

``xxh3`` of a file is the xxh3_128 of its bytes; ``xxh3`` of the manifest is that of all its other fields.
Sizes are checked whenever a directory is opened; `verify_cache` reads every byte again and compares hashes, which a
flipped bit cannot hide from. What is damaged and discarded is built again by the next preparation, alone. Single files
that are rewritten, such as a JSON of results, go through `write_atomically`, those that grow by lines through `append`.
Cost: a reused directory costs one small read and a stat a file; a built one a hash and an fsync a file; verifying that
of the disk, 5 GB/s from memory.
"""

import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import xxhash

from data_prep.errors import StoreError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
BUILDING = ".building-"
STAGES = ("records", "tokens", "plans", "tokenizers", "near_duplicates")  # the stores of a cache directory
HASH_CHUNK_BYTES = 1 << 20  # stays in a processor's cache while it is hashed
STALE_SECONDS = 24 * 3600  # another host's temporary directory that nobody has written to for so long


class FileEntry(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Built:
    """A complete directory of the store and its manifest; ``reused`` when nothing had to be made."""

    path: Path
    manifest: dict[str, Any]
    reused: bool


@dataclass(frozen=True)
class Verified:
    """``damaged`` maps a directory of the store to the names of its damaged files."""

    directories: int
    size_bytes: int
    damaged: dict[str, list[str]]
    discarded: bool


def fingerprint(**parts: Any) -> str:
    """32 hex digits that change with every part and with the format version, and with nothing else."""
    return _hash_json({"format_version": FORMAT_VERSION, **parts})


def hash_file(path: str | Path, start: int = 0, stop: int | None = None) -> str:
    """xxh3_128 of a file's bytes (or of ``start:stop``), 32 hex digits (5-7 GB/s)."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as stream:
        stream.seek(start)
        left = os.fstat(stream.fileno()).st_size - start if stop is None else stop - start
        buffer = memoryview(bytearray(min(max(left, 0), HASH_CHUNK_BYTES)))
        while left > 0 and (size := stream.readinto(buffer[: min(left, len(buffer))])):
            digest.update(buffer[:size])
            left -= size
    return digest.hexdigest()


def build(root: Path, fp: str, make: Callable[[Path], dict[str, Any]]) -> Built:
    """The complete directory ``root/fp``: reused if it is there, else written by ``make(directory) -> manifest body``.

    ``make`` writes into a temporary sibling. Of two builders at once the second to finish discards its own work.
    """
    path = root / fp
    if found := find(path):
        return found
    with building(root, fp) as directory:
        return publish(directory, path, make(directory))


@contextmanager
def building(root: Path, fp: str) -> Iterator[Path]:
    """A temporary directory beside ``root/fp`` for `publish`; gone afterwards, and recognised as stale after a kill."""
    root.mkdir(parents=True, exist_ok=True)
    remove_stale(root)
    while True:
        path = _temporary(root, fp)
        path.mkdir()
        with _open_directory(path) as descriptor:
            # Between mkdir and flock another process may have taken it for stale: then it is gone, and we try again.
            if descriptor is None or not try_lock(descriptor) or not path.exists():
                continue
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
            return


def publish(directory: Path, path: Path, body: dict[str, Any]) -> Built:
    """Complete a directory of `building` with its manifest and rename it to ``path``."""
    _write_manifest(directory, body)
    return _rename(directory, path)


def find(path: Path) -> Built | None:
    """The complete directory at ``path``, or None; a damaged one is named in a warning."""
    if not path.exists():
        return None
    try:
        return Built(path, open_manifest(path), reused=True)
    except StoreError as error:
        logger.warning("%s; it is built again", error)
        return None


def open_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a complete directory, after checking version, its own hash and every file's size.

    :raises StoreError: naming what is missing or damaged.
    """
    manifest = _read_manifest(path)
    for name, entry in manifest["files"].items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != entry["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            raise StoreError(f"{path / name}: {found} instead of {entry['bytes']} bytes; prepare the data again")
    return manifest


def verify(path: Path) -> list[str]:
    """Names of the damaged files of one directory, after reading every byte of it (1 GB in about 0.3 s).

    A manifest that is itself damaged says nothing of the others: then it alone is named.
    """
    try:
        manifest = _read_manifest(path)
    except StoreError:
        return [MANIFEST]
    return [name for name, entry in manifest["files"].items() if not _intact(path / name, entry)]


def verify_cache(cache_dir: Path, discard_damaged: bool = False) -> Verified:
    """Hash everything below a cache directory."""
    paths = [path for stage in STAGES for path in directories(Path(cache_dir) / stage)]
    with ThreadPoolExecutor() as threads:
        damaged = {str(path): names for path, names in zip(paths, threads.map(verify, paths), strict=True) if names}
    size = sum(file.stat().st_size for path in paths for file in path.iterdir() if file.is_file())
    if discard_damaged:
        for path in damaged:
            discard(Path(path))
    return Verified(len(paths), size, damaged, discard_damaged and bool(damaged))


def discard(path: Path) -> None:
    """Remove a directory from the store; the next preparation builds it again."""
    removed = _temporary(path.parent, path.name)
    try:
        path.rename(removed)  # at once, so that nobody opens half of it
    except FileNotFoundError:
        return
    shutil.rmtree(removed, ignore_errors=True)


def directories(root: Path) -> list[Path]:
    """The directories of a store that claim to be complete, in the order of their names."""
    return sorted(path for path in root.glob("*") if path.is_dir() and not path.name.startswith("."))


def write_atomically(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a file that its readers find as it was or as it is now, never in part, however many write it at once.

    :param mode: who may read it, less what the umask takes away; 0o600 = its owner alone.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as stream:
            stream.write(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, lines: str, mode: int = 0o666) -> None:
    """Add whole lines to a file, all of them or none: see `appending`."""
    with appending(path, mode) as add:
        add(lines)


@contextmanager
def appending(path: Path, mode: int = 0o666) -> Iterator[Callable[[str], None]]:
    """A function that adds whole lines to a file. Those who append to one file wait for each other.

    What a disk that fills has taken of them is taken back, and the half line of a writer that was cut off goes: the
    next line would be added to it, and no reader could make anything of the two. A last line that only lacks its end,
    as people leave it, gets one. Cost: 20 us.

    :raises OSError: the lines were not written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, mode)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield lambda lines: _add(descriptor, path, lines.encode())
    finally:
        os.close(descriptor)


def _add(descriptor: int, path: Path, lines: bytes) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        before = os.pread(descriptor, size, 0)
        start = before.rfind(b"\n") + 1
        try:
            json.loads(before[start:])
            lines = b"\n" + lines
        except (ValueError, RecursionError):
            size = start
            os.ftruncate(descriptor, size)
    try:
        if os.write(descriptor, lines) < len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def remove_stale(root: Path) -> None:
    """Remove the temporary directories whose builder died: nobody holds their lock any more."""
    for path in filter(_may_be_stale, root.glob(f"{BUILDING}*")):
        with _open_directory(path) as descriptor:
            if descriptor is not None and try_lock(descriptor):
                shutil.rmtree(path, ignore_errors=True)


def _temporary(root: Path, fp: str) -> Path:
    """A new name for a directory on its way into the store, or out of it."""
    return root / f"{BUILDING}{fp}-{socket.gethostname()}-{secrets.token_hex(4)}"


def _may_be_stale(path: Path) -> bool:
    """Of this host, or long untouched: whether a builder on another host lives, its lock cannot tell."""
    if f"-{socket.gethostname()}-" in path.name:
        return True
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > STALE_SECONDS
    return False


@contextmanager
def _open_directory(path: Path) -> Iterator[int | None]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Take an exclusive flock unless somebody holds one; whether it was taken."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_manifest(directory: Path, body: dict[str, Any]) -> None:
    files: dict[str, FileEntry] = {}
    for path in sorted(directory.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "xxh3": hash_file(path)}
        fsync(path)
    manifest = {"format_version": FORMAT_VERSION, "files": files, **body}
    manifest["xxh3"] = _hash_json(manifest)
    with open(directory / MANIFEST, "w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1, ensure_ascii=False)
        stream.flush()
        os.fsync(stream.fileno())
    fsync(directory)


def _rename(directory: Path, path: Path) -> Built:
    """Rename into place, under the lock of the root so that nobody swaps out what another has just put there."""
    with _open_directory(path.parent) as root:
        assert root is not None, "the root holds the directory that is being published"
        fcntl.flock(root, fcntl.LOCK_EX)
        if theirs := find(path):
            return theirs
        try:
            directory.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            discard(path)  # damaged: `find` has reported it
            directory.rename(path)
        os.fsync(root)
    return Built(path, open_manifest(path), reused=False)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{path}: no {MANIFEST}, so this was never completed; prepare the data again") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path / MANIFEST}: damaged ({error}); remove the directory and prepare again") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version") if isinstance(manifest, dict) else None
        raise StoreError(
            f"{path}: format version {found}, this program reads {FORMAT_VERSION}; remove it and prepare again"
        )
    if _hash_json({name: value for name, value in manifest.items() if name != "xxh3"}) != manifest.get("xxh3"):
        raise StoreError(f"{path / MANIFEST}: damaged (its hash differs); remove the directory and prepare again")
    return manifest


def _intact(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and hash_file(path) == entry["xxh3"]


def _hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def fsync(path: Path) -> None:
    """Have what was written of a file, or of the names in a directory, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
