"""Addresses: directories and files on s3://, gs://, hf:// and every other file system that fsspec knows.

In: an address. Out: `Listed` files with the version of each (its etag, or what else tells it from what replaces it),
and their bytes. Credentials and endpoints are the business of the environment and of fsspec's own configuration, as
with every program that uses fsspec: an address that holds some is refused, and no message repeats what a server said
of its signed links. Chains of file systems (``zip::...``) are refused as well.
Cost: a listing; a request for every range of bytes.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import CorpusError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocols whose package an extra of this project installs."""
VERSION_FIELDS = ("ETag", "etag", "generation", "blob_id", "Content-MD5", "Digest", "checksum")
TIME_FIELDS = ("LastModified", "Last-Modified", "last_modified", "updated", "modified", "mtime", "created", "ino")
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_QUERY = re.compile(r"\?[^\s'\"]+")


@dataclass(frozen=True)
class Listed:
    """A file somewhere: its address, its path below the directory that was listed, its size and its version."""

    address: str
    parts: tuple[str, ...]
    size: int
    version: str


def is_address(place: str) -> bool:
    """Whether it is an address rather than a path of this machine."""
    return _ADDRESS.match(place) is not None


def problem_of(address: str) -> str | None:
    """What is wrong with the form of an address; the answer never repeats a secret."""
    if "::" in address:
        return "chains of file systems (::) are not read; copy the files, or give the directory itself"
    authority = address.partition("://")[2].partition("/")[0]
    if "@" in authority and ":" in authority.rpartition("@")[0]:
        return "it holds a password; credentials are read from the environment, not from addresses"
    if "?" in address:
        return "it holds a query (?...), which may be a signature; give the plain address"
    return None


def list_files(address: str) -> list[Listed]:
    """All files below an address, in no certain order.

    :raises CorpusError: it cannot be listed, or the package that reads it is not installed.
    """
    with _explained(address):
        fs, root = _file_system(address)
        protocol = address.partition("://")[0]
        root = root.rstrip("/")
        fs.invalidate_cache()
        listed = []
        for path, found in fs.find(root, detail=True).items():
            info = found if found.get("size") is not None and _version(found) else fs.info(path)
            inner = path.removeprefix(root).strip("/")
            name = f"{protocol}://{path}" if not is_address(path) else path
            parts = tuple(inner.split("/")) if inner else (path.rpartition("/")[2],)
            listed.append(Listed(name, parts, int(info["size"]), _version(info)))
        return listed


def read_range(address: str, start: int, stop: int) -> bytes:
    """The bytes ``start:stop`` of a file."""
    with _explained(address):
        fs, path = _file_system(address)
        data = fs.cat_file(path, start=start, end=stop)
    if len(data) != stop - start:
        raise CorpusError(f"{address}: {len(data)} bytes came from {start} to {stop}; run again")
    return data


def look(address: str) -> Listed:
    """One file as it is now."""
    with _explained(address):
        fs, path = _file_system(address)
        fs.invalidate_cache()
        info = fs.info(path)
        return Listed(address, (path.rpartition("/")[2],), int(info["size"]), _version(info))


def check_version(address: str, version: str) -> None:
    """Whether a file is still what it was.

    :raises CorpusError: it has been replaced; the message names both versions.
    """
    if (now := look(address).version) != version:
        raise CorpusError(
            f"{address} was replaced while it was read (it was {version}, now it is {now}); "
            "run again when nobody writes to it"
        )


def require_readable(address: str) -> None:
    """Whether an address has a form that is read, and the package that reads it is there; nothing is asked of it.

    :raises CorpusError: otherwise.
    """
    with _explained(address):
        _file_system(address)


def absolute(place: str) -> str:
    """A path of this machine from its root; an address as it is."""
    return place if is_address(place) else str(Path(place).absolute())


class RangeStream:
    """As much of a file object as looking for places in a remote file takes: every read is a request."""

    def __init__(self, address: str, size: int):
        self.address = address
        self.size = size
        self.position = 0

    def seek(self, position: int) -> int:
        self.position = position
        return position

    def tell(self) -> int:
        return self.position

    def __enter__(self) -> "RangeStream":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def read(self, size: int) -> bytes:
        stop = min(self.position + size, self.size)
        data = read_range(self.address, self.position, stop) if stop > self.position else b""
        self.position += len(data)
        return data


def _file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it."""
    from fsspec.core import url_to_fs

    protocol = address.partition("://")[0]
    try:
        return url_to_fs(address)
    except ImportError as error:
        extra = EXTRAS.get(protocol.lower())
        how = f"pip install 'panda-train[{extra}]'" if extra else str(error)
        raise CorpusError(f"{address}: the package that reads {protocol}:// is not installed: {how}") from None


def _version(info: dict[str, Any]) -> str:
    """What tells a file from one that replaces it; empty where a listing says nothing of the kind."""
    for name in VERSION_FIELDS:
        if info.get(name):
            return str(info[name]).strip('"')
    times = [f"{name} {info[name]}" for name in TIME_FIELDS if info.get(name)]
    return ", ".join([*times, f"{info.get('size')} bytes"]) if times else ""


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """What a file system raises, as one line without the queries of addresses, which may be signatures."""
    if problem := problem_of(address):
        raise CorpusError(f"{without_secrets(address)}: {problem}")
    try:
        yield
    except CorpusError:
        raise
    except FileNotFoundError:
        raise CorpusError(f"{address}: there is nothing there") from None
    except Exception as error:
        said = _QUERY.sub("?...", str(error)) or "no reason given"
        raise CorpusError(f"{address}: {type(error).__name__}: {said}") from None


def without_secrets(address: str) -> str:
    """An address as it may be shown: without what stands before an @, and without a query."""
    protocol, _, rest = address.partition("?")[0].partition("://")
    authority, slash, path = rest.partition("/")
    return f"{protocol}://{authority.rpartition('@')[2]}{slash}{path}"
