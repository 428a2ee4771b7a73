"""CSV and TSV -> blocks of records: the first row names the fields, every other row is a record of texts.

In: a `Source`. Out: `Block`s whose records are dicts, with the bytes of each row beside them. RFC 4180 in UTF-8: a cell
in quotes may hold the separator, line feeds and quotes twice; an empty cell is the empty text. Blank lines separate.
A row that cannot be read costs itself alone: after a quote that is not closed, or has text behind it, reading goes on
at the next line. Nothing of a row is guessed: with other than the header's number of cells it is rejected.
A file is one piece, because where a row begins depends on all quotes before it. Cost: 60 MB/s; memory a few MiB.
"""

import csv
from collections import Counter, deque
from collections.abc import Iterator

import numpy as np

from data_prep.errors import CorpusError
from data_prep.records.reasons import Reason
from data_prep.records.source import Block, Source

DELIMITERS = {"csv": ",", "tsv": "\t"}
BLOCK_BYTES = 1 << 20
MAX_CELL_CHARACTERS = 16 << 20

Row = tuple[list[str] | None, bytes]
"""The cells, None where they cannot be read, and the bytes they were read from."""


def read_csv(stream: Source) -> Iterator[Block]:
    """All rows of a file in order; what is no row comes with a reason.

    :raises CorpusError: the header cannot be read, or names a field twice.
    """
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    reading = _Reading(stream)
    yield from reading.blocks()
    if stream.truncated:
        reading.add({}, b"", Reason.TRUNCATED_FILE)
        yield reading.block()


class _Reading:
    """Goes through the rows of a file; the rows since the last block are in lists."""

    def __init__(self, stream: Source):
        self.stream = stream
        self.offset = 0
        self.line = 1
        self._clear()

    def _clear(self) -> None:
        self.records: list[dict[str, str]] = []
        self.found: list[bytes] = []
        self.places: list[tuple[int, int]] = []
        self.faults: dict[int, Reason] = {}
        self.size = 0

    def blocks(self) -> Iterator[Block]:
        """Every row below the header, but for blank lines."""
        rows = _rows(_Lines(self.stream), DELIMITERS[str(self.stream.piece.form)])
        names: list[str] = []
        while not names:
            cells, found = next(rows, (None, b""))
            if not found:
                return
            names = _names(cells, self.stream.piece.path)
            self._pass(found)
        for cells, found in rows:
            if cells is None or len(cells) == len(names):
                self.add(dict(zip(names, cells or [], strict=False)), found, None if cells else Reason.MALFORMED_ROW)
            elif cells:
                self.add({}, found, Reason.MALFORMED_ROW)
            self._pass(found)
            if self.size >= BLOCK_BYTES:
                yield self.block()
        if self.records:
            yield self.block()

    def _pass(self, found: bytes) -> None:
        self.offset += len(found)
        self.line += found.count(b"\n")

    def add(self, record: dict[str, str], found: bytes, fault: Reason | None) -> None:
        """One row, which begins where reading is."""
        if fault:
            self.faults[len(self.records)] = fault
        self.records.append(record)
        self.found.append(found.rstrip(b"\r\n"))
        self.places.append((self.offset, self.line))
        self.size += len(found)

    def block(self) -> Block:
        """The rows since the last one."""
        offsets, lines = np.array(self.places, np.int64).T
        lengths = np.fromiter(map(len, self.found), np.int64, len(self.found))
        block = Block(self.records, offsets, lengths, lines, self.faults, self.found)
        self._clear()
        return block


class _Lines:
    """The lines of a file as texts, and the bytes of those that were ``taken`` since somebody cleared that list."""

    def __init__(self, stream: Source):
        self.taken: list[bytes] = []
        self._begun = False
        self._ahead: deque[bytes] = deque()
        self._source = _split(stream.chunks())

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else next(self._source)
        self.taken.append(line)
        text = line.decode("utf-8", "surrogateescape")  # what is not UTF-8 is found where it is used
        if not self._begun:
            self._begun, text = True, text.removeprefix("\ufeff")
        return text

    def give_back(self) -> None:
        """All lines that were taken but the first."""
        self._ahead.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def _split(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines with their ends; a BOM at the beginning is a part of the first."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if len(rest) > MAX_CELL_CHARACTERS:
            yield rest
            rest = b""
    if rest:
        yield rest


def _rows(lines: _Lines, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.taken.clear()
        cells: list[str] | None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            cells = None
            lines.give_back()
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
        yield cells, b"".join(lines.taken)


def _names(cells: list[str] | None, path: str) -> list[str]:
    """The fields that the header names."""
    if cells is None:
        raise CorpusError(f"{path}: the first row, which must name the columns, has a quote that is not closed")
    names = [cell.strip() for cell in cells]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise CorpusError(f"{path}: the first row, which must name the columns, names {twice[0]!r} twice")
    return names
