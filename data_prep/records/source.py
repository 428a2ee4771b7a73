"""Where the bytes come from: a `Piece` of a file as chunks (`Source`), seen through a `Window`, taken as `Block`s.

In: a path and a range. Out: decompressed bytes with offsets and line numbers. Nothing here knows JSON.
Cost: reading, newline counting and hashing, 1-2 GB/s; igzip about 350 MB/s. Memory: the window.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
import xxhash
import zstandard
from isal import isal_zlib

from data_prep.places.download import RemoteFile
from data_prep.records.reasons import Reason

Form = Literal["lines", "array", "values", "csv", "tsv", "parquet", "arrow"]
"""What is in a file: three forms of JSON, and tables."""
WHOLE = ("parquet", "arrow")
TABLES: dict[str, Form] = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow"}
WINDOW_BYTES = 4 << 20
READ_BYTES = 256 << 10  # small: chunks of a whole window leave holes between records, which glibc does not fill again
GZIP_CHUNK_BYTES = 16 << 10  # at most 17 MB decompressed
ZSTD_CHUNK_BYTES = 512  # at most 17 MB decompressed: 4 bytes can stand for 128 KiB


@dataclass(frozen=True)
class Piece:
    """What one reader reads: the bytes ``start:stop`` of a file (of a compressed file always all of them).

    ``first`` and ``last`` say whether the file begins and ends here; ``opening`` is the text by which the elements of
    an array were seen to begin, for example ``,\\n  {\\n    "input"`` (only a hint for the first guess of a border);
    of a part of a table the hash of its schema. ``path`` is the address of a ``remote`` file.
    """

    path: str
    start: int = 0
    stop: int | None = None
    form: Form | None = None
    opening: bytes = b""
    first: bool = True
    last: bool = True
    remote: RemoteFile | None = None

    @property
    def range(self) -> str:
        """Its place in the file, as a key."""
        return f"{self.start}-{'' if self.stop is None else self.stop}"

    def plain(self) -> dict[str, Any]:
        """What `RemoteFile` remembers of it."""
        return {
            **{name: getattr(self, name) for name in ("start", "stop", "form", "first", "last")},
            "opening": self.opening.hex(),
        }

    def here(self) -> tuple[str, int, int | None]:
        """The bytes on this machine: a file and a range of it. Some tables are read at many places: so as a whole."""
        if self.remote is None:
            return self.path, self.start, self.stop
        if self.form in WHOLE:
            return str(self.remote.fetch()), self.start, self.stop
        return str(self.remote.fetch(self.start, self.stop)), 0, None

    def release(self) -> None:
        """What was fetched is not needed any more; a whole file is kept as long as there are parts to come."""
        if self.remote and self.form not in WHOLE:
            self.remote.release(self.start, self.stop)
        elif self.remote and self.last:
            self.remote.release()


def compression_of(path: str) -> str:
    """`gz`, `zst`, or empty, by the name of the file."""
    return next((suffix for suffix in ("gz", "zst") if path.endswith(f".{suffix}")), "")


def table_of(path: str) -> Form | None:
    """The form of a table, by the name of the file; None = JSON."""
    compression = compression_of(path)
    name = path.removesuffix(f".{compression}") if compression else path
    return next((form for suffix, form in TABLES.items() if name.endswith(suffix)), None)


@dataclass
class Block:
    """Consecutive records of a piece. ``faults``: index of a record -> why it is none. All arrays are (n,) int64.

    ``records`` are bytes of JSON, or values (dicts, mostly), which have ``found`` beside them, the bytes that they were
    read from, unless they have none: then ``offsets`` are -1.
    """

    records: list
    offsets: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray
    faults: dict[int, Reason] = field(default_factory=dict)
    found: list[bytes] = field(default_factory=list)

    @property
    def is_parsed(self) -> bool:
        """Whether the records are values rather than bytes of JSON."""
        return not isinstance(self.records[0], (bytes, msgspec.Raw))


class Source:
    """The bytes of a piece as chunks, decompressed; knows afterwards what it read and whether it was cut off."""

    def __init__(self, piece: Piece):
        self.piece = piece
        self.truncated = False
        self.size = 0
        self.newlines = 0
        self._digest = xxhash.xxh3_128()

    @property
    def content_hash(self) -> str:
        """xxh3_128 of the bytes of the file that were read (compressed as they are)."""
        return self._digest.hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """The decompressed bytes."""
        compression = compression_of(self.piece.path)
        if compression == "gz":
            gzip_error: Any = isal_zlib.error  # a class, which isal's stub calls an instance
            yield from self._inflated(lambda: isal_zlib.decompressobj(wbits=31), gzip_error, GZIP_CHUNK_BYTES)
        elif compression == "zst":
            yield from self._inflated(
                lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError, ZSTD_CHUNK_BYTES
            )
        else:
            yield from self._stored(READ_BYTES)

    def _stored(self, chunk_bytes: int) -> Iterator[bytes]:
        path, start, stop = self.piece.here()
        with open(path, "rb", buffering=READ_BYTES) as stream:
            stream.seek(start)
            left = (1 << 62) if stop is None else stop - start
            while left and (chunk := stream.read(min(chunk_bytes, left))):
                left -= len(chunk)
                self.size += len(chunk)
                self.newlines += chunk.count(b"\n")
                self._digest.update(chunk)
                yield chunk

    def _inflated(self, new: Callable, damaged: type[Exception], chunk_bytes: int) -> Iterator[bytes]:
        """One or more compressed streams, one after another. A damaged one is read up to the damage."""
        stream = None
        for chunk in self._stored(chunk_bytes):
            rest = chunk
            while rest and not self.truncated:  # after damage only the hash goes on
                stream = stream or new()
                try:
                    data = stream.decompress(rest)
                except damaged:
                    self.truncated = True
                    break
                if data:
                    yield data
                rest = stream.unused_data if stream.eof else b""
                stream = None if stream.eof else stream
        self.truncated = self.truncated or stream is not None


class Window:
    """A stretch of the source in memory: ``data[position:]`` is what nobody has taken yet."""

    def __init__(self, source: Source):
        self._source = source
        self._chunks = source.chunks()
        self.data = b""
        self.position = 0
        self.base = 0  # offset of data[0] in the (decompressed) source
        self.line = 1  # line of data[position]
        self.at_end = False

    @property
    def truncated(self) -> bool:
        return self._source.truncated

    def fill(self, size: int) -> int:
        """Make ``size`` bytes available, fewer only at the end; returns how many there are."""
        have = len(self.data) - self.position
        if have < size and not self.at_end:
            parts = [self.data[self.position :]]
            self.base += self.position
            self.data, self.position = b"", 0  # freed before as much is read and joined
            while have < size:
                chunk = next(self._chunks, None)
                if chunk is None:
                    self.at_end = True
                    break
                parts.append(chunk)
                have += len(chunk)
            self.data = b"".join(parts)
        return have

    def skip(self, end: int) -> None:
        """Pass over separators up to ``data[end]``."""
        self.line += self.data.count(b"\n", self.position, end)
        self.position = end

    def take(self, records: list, starts: np.ndarray, lengths: np.ndarray, end: int) -> Block:
        """A block of the records at ``data[starts]``, and pass over everything up to ``data[end]``."""
        newlines = np.flatnonzero(np.frombuffer(self.data, np.uint8)[self.position : end] == 10) + self.position
        lines = self.line + np.searchsorted(newlines, starts)
        self.line += len(newlines)
        self.position = end
        return Block(records, self.base + starts, lengths, lines)

    def take_one(self, end: int, fault: Reason | None = None, start: int | None = None) -> Block:
        """A block of the one record ``data[start:end]``."""
        start = self.position if start is None else start
        record = self.data[start:end]
        block = self.take([record], np.array([start]), np.array([len(record)]), end)
        if fault:
            block.faults[0] = fault
        return block
