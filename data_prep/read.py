"""Bytes of a file -> blocks of records, streamed: JSON array, JSON Lines, objects one after another; plain, .gz, .zst.

In: a `Piece` (a file, or a part of a large one). Out: `Block`s: the bytes of each record with offset, length and line,
and, for what is no record, a reason. Nothing is skipped: every byte is part of a record or a separator.

The form is found by looking at the first 4 MiB, not at the name of the file. JSON Lines are cut at newlines. Arrays:

    1. A window of up to 4 MiB is cut at the last place that *looks like* a border between two records.
    2. `[` + window + `]` is parsed into raw elements (1 GB/s). If it is valid JSON, the guess was right: a parser that
       comes to the end of a complete value there would do so in the whole file too. No structural scan is needed.
    3. If not, smaller windows are tried, and finally one element is scanned with care (50 MB/s): a broken element ends
       where the next one that is a valid record begins, so one bad record costs itself alone.

Memory: a window of 4 MiB and its records, whatever the size of the file; a record longer than 64 MiB is rejected.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import msgspec
import numpy as np
import xxhash
import zstandard
from isal import isal_zlib

from data_prep.ledger import Reason
from data_prep.normalise import Rejected, decode, normalise

Form = Literal["lines", "array", "values"]
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst")
HEAD_BYTES = 4 << 20
WINDOW_BYTES = 4 << 20
MIN_WINDOW_BYTES = 32 << 10
MAX_RECORD_BYTES = 64 << 20
PATIENCE_BYTES = 256 << 10  # an element open for longer than this is doubted: a known border inside ends it
COMPRESSED_CHUNK_BYTES = 16 << 10
BOM = b"\xef\xbb\xbf"

_SEPARATORS = re.compile(rb"[\s,]*+")
_INSIDE = rb'[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+'  # of a string; a raw control character ends the belief in it
_SCALAR = re.compile(rb'"%b"|[^\s,\[\]{}"]++' % _INSIDE)
_TOKEN = re.compile(rb'"%b"|([:,]?)\s*+([{\[])|[}\]]|"' % _INSIDE)
_OPEN_STRING = re.compile(rb"%b\\?\Z" % _INSIDE)
_AFTER_STRING = re.compile(rb"\s*+[:,\]}]")
_AFTER_SCALAR = re.compile(rb"\s*+(?:[,\]]|\Z)")
_NEARLY_END = re.compile(rb"\s*+\Z")
_BORDER = re.compile(rb"[}\]]\s*+,\s*+(?=[{\[])")
_RESUME = re.compile(rb"(?:[}\]]\s*+,|\n)\s*+(?=[{\[])")
_OPENING = re.compile(rb'\s*+,\s*+[{\[](?:\s*+[{\[])*+\s*+"(?:[^"\\\x00-\x1f]){0,64}"')
_ARRAY_END = re.compile(rb"\s*+\]\s*+\Z")
_CLOSER = {ord("{"): ord("}"), ord("["): ord("]")}

_IS_SEPARATOR = np.isin(np.arange(256), list(b" \t\r\n\f\v,"))
_decode_elements = msgspec.json.Decoder(list[msgspec.Raw]).decode


@dataclass(frozen=True)
class Piece:
    """What one reader reads: the bytes ``start:stop`` of a file (of a compressed file always all of them).

    ``first`` and ``last`` say whether the file begins and ends here; ``opening`` is the text by which the elements of
    an array were seen to begin, for example ``,\\n  {\\n    "input"`` (only a hint for the first guess of a border).
    """

    path: str
    start: int = 0
    stop: int | None = None
    form: Form | None = None
    opening: bytes = b""
    first: bool = True
    last: bool = True


@dataclass
class Block:
    """Consecutive records of a piece. ``faults``: index of a record -> why it is none. All arrays are (n,) int64."""

    records: list
    offsets: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray
    faults: dict[int, Reason] = field(default_factory=dict)


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
        if self.piece.path.endswith(".gz"):
            yield from self._inflated(lambda: isal_zlib.decompressobj(wbits=31), isal_zlib.error)
        elif self.piece.path.endswith(".zst"):
            yield from self._inflated(lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError)
        else:
            yield from self._stored(WINDOW_BYTES)

    def _stored(self, chunk_bytes: int) -> Iterator[bytes]:
        with open(self.piece.path, "rb", buffering=0) as stream:
            stream.seek(self.piece.start)
            left = (1 << 62) if self.piece.stop is None else self.piece.stop - self.piece.start
            while left and (chunk := stream.read(min(chunk_bytes, left))):
                left -= len(chunk)
                self.size += len(chunk)
                self.newlines += chunk.count(b"\n")
                self._digest.update(chunk)
                yield chunk

    def _inflated(self, new: Callable, damaged: type[Exception]) -> Iterator[bytes]:
        """One or more compressed streams, one after another. A damaged one is read up to the damage."""
        stream = None
        for chunk in self._stored(COMPRESSED_CHUNK_BYTES):
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
            while have < size:
                chunk = next(self._chunks, None)
                if chunk is None:
                    self.at_end = True
                    break
                parts.append(chunk)
                have += len(chunk)
            self.base += self.position
            self.data = b"".join(parts)
            self.position = 0
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


def read_blocks(source: Source) -> Iterator[Block]:
    """All records of a piece in file order; what is no record comes with a reason."""
    window = Window(source)
    window.fill(HEAD_BYTES)
    if source.piece.first and window.data.startswith(BOM):
        window.skip(len(BOM))
    form = source.piece.form or find_form(window.data[window.position :])
    if form == "lines":
        yield from _lines(window)
    else:
        yield from _Elements(window, source.piece, form).blocks()


def find_form(head: bytes) -> Form:
    """What the first bytes of a file say that it is.

    An array on one line with another line after it is a JSON Lines record (a list of turns); alone it is an array.
    An object that does not end with its line is JSON Lines all the same if a later line is an object.
    """
    head = head.lstrip()
    line, _, rest = head.partition(b"\n")
    if head.startswith(b"["):
        return "lines" if rest.strip() and _is_json(line) else "array"
    if not head.startswith(b"{") or not rest or _is_json(line):
        return "lines"
    following = rest.split(b"\n", 64)[:64]
    return "lines" if any(text.startswith(b"{") and _is_json(text) for text in following) else "values"


def find_opening(head: bytes) -> bytes:
    """How an element of an array begins after another, separator included (see `Piece`); empty if that is not seen."""
    first = _SEPARATORS.match(head, head.find(b"[") + 1).end()
    for start in (first, *(match.end() for match in islice(_RESUME.finditer(head, first), 64))):
        end, complete = _scan(head, start)
        if complete and (match := _OPENING.match(head, end)):
            return match.group()
    return b""


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _is_record(data: bytes) -> bool:
    for kind in ("instruction", "pretraining"):
        try:
            normalise(decode(data), kind)
        except Rejected:
            continue
        return True
    return False


def _lines(window: Window) -> Iterator[Block]:
    size, block = WINDOW_BYTES, None
    while have := window.fill(size):
        end = len(window.data) if window.at_end else window.data.rfind(b"\n", window.position) + 1
        if end > window.position:
            size, block = WINDOW_BYTES, _cut_lines(window, end)
            if block.records:
                yield block
        elif have >= MAX_RECORD_BYTES:
            yield window.take_one(len(window.data), Reason.OVERSIZED_RECORD)
        else:
            size = 2 * have
    if window.truncated and not (block and Reason.TRUNCATED_FILE in block.faults.values()):
        yield window.take_one(window.position, Reason.TRUNCATED_FILE)


def _cut_lines(window: Window, end: int) -> Block:
    data = np.frombuffer(window.data, np.uint8)
    newlines = np.flatnonzero(data[window.position : end] == 10) + window.position
    starts = np.concatenate(([window.position], newlines + 1))
    stops = np.concatenate((newlines, [end]))
    filled = np.flatnonzero(stops > starts)
    starts, stops = starts[filled], stops[filled]
    records = [window.data[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
    line, base = window.line, window.base
    window.position, window.line = end, line + len(newlines)
    records, kept = _without_blank(records)
    block = Block(records, base + starts[kept], (stops - starts)[kept], line + filled[kept])
    if records and stops[-1] == end and window.at_end and _is_cut_off(records[-1]):
        block.faults[len(records) - 1] = Reason.TRUNCATED_FILE
    return block


def _without_blank(records: list[bytes]) -> tuple[list[bytes], np.ndarray | slice]:
    """Drop the lines of white space alone, which only short lines can be worth a look for."""
    blank = {index for index, record in enumerate(records) if len(record) < 64 and record.isspace()}
    if not blank:
        return records, slice(None)
    kept = np.array([index for index in range(len(records)) if index not in blank], np.int64)
    return [records[index] for index in kept], kept


def _is_cut_off(record: bytes) -> bool:
    """Whether a last line without newline is the beginning of a record."""
    start = len(record) - len(record.lstrip())
    return record[start : start + 1] in (b"{", b"[") and not _is_json(record) and _scan(record, start)[0] == len(record)


class _Elements:
    """The elements of an array, or objects one after another: the state is the window and what was learned so far."""

    def __init__(self, window: Window, piece: Piece, form: Form):
        self.window = window
        self.piece = piece
        self.form = form
        self.opening = piece.opening
        self.size = WINDOW_BYTES
        self.closed = form == "values"
        self.cut_off = False

    def blocks(self) -> Iterator[Block]:
        """All of them. An array that is not closed at the end of the file ends in a `truncated_file` of no bytes."""
        if self.form == "array" and self.piece.first:
            self.window.skip(self.window.data.index(b"[", self.window.position) + 1)
        while self._next_element():
            yield self._fast() or self._careful()
        unfinished = self.window.truncated or (self.piece.last and not self.closed)
        if unfinished and not self.cut_off:
            yield self.window.take_one(self.window.position, Reason.TRUNCATED_FILE)

    def _next_element(self) -> bool:
        """Pass over separators and the ends of arrays. A second array after the first one is read like it."""
        window = self.window
        while True:
            end = _SEPARATORS.match(window.data, window.position).end()
            window.skip(end)
            if end == len(window.data):
                if not window.fill(self.size):
                    return False
            elif self.form == "array" and window.data[end] == ord("]"):
                self.closed = True
                window.skip(end + 1)
            elif self.form == "array" and self.closed and window.data[end] == ord("["):
                self.closed = False
                window.skip(end + 1)
            else:
                return True

    def _fast(self) -> Block | None:
        """As many elements at once as the window holds, or None if the next one needs care."""
        while self.form == "array" and not self.closed:
            self.window.fill(self.size)
            for end in self._borders():
                if block := self._parse(end):
                    self.size = min(4 * self.size, WINDOW_BYTES)
                    return block
            if self.size <= MIN_WINDOW_BYTES:
                return None
            self.size = max(self.size // 8, MIN_WINDOW_BYTES)
        return None

    def _borders(self) -> Iterator[int]:
        """Guesses where an element of the window ends, the best first."""
        data, position = self.window.data, self.window.position
        limit = min(position + self.size, len(data))
        if limit == len(data) and self.window.at_end and (match := _ARRAY_END.search(data, max(position, limit - 64))):
            yield match.start()
        if self.opening and (end := data.rfind(self.opening, position, limit)) > position:
            yield end
        tail = max(position, limit - MIN_WINDOW_BYTES)
        ends = [match.start() + 1 for match in _BORDER.finditer(data, tail, limit)]
        yield from reversed(ends[-4:])

    def _parse(self, end: int) -> Block | None:
        window = self.window
        try:
            records = _decode_elements(b"[%b]" % memoryview(window.data)[window.position : end])
        except (msgspec.DecodeError, RecursionError):
            return None
        if not records:
            return None
        lengths = np.fromiter(map(len, records), np.int64, len(records))
        starts = _locate(window.data, window.position, end, records, lengths)
        return window.take(records, starts, lengths, end)

    def _careful(self) -> Block:
        """The one element at the position, sound or broken. Takes more of the source only as long as it must."""
        window = self.window
        while True:
            limit = len(window.data) if window.at_end else window.position + MAX_RECORD_BYTES
            end, complete = _scan(window.data, window.position)
            if complete:
                return self._take_complete(end)
            open_end = end == len(window.data)
            if (resume := self._resume(end, open_end)) is not None:
                return self._take_broken(resume)
            have = len(window.data) - window.position
            if window.at_end or len(window.data) >= limit:
                return self._take_rest(open_end)
            window.fill(2 * have)

    def _take_complete(self, end: int) -> Block:
        window = self.window
        if not self.opening and self.form == "array" and (match := _OPENING.match(window.data, end)):
            self.opening = match.group()
        return window.take_one(end)

    def _take_broken(self, resume: int) -> Block:
        data, start = self.window.data, self.window.position
        text = data[start:resume].rstrip()
        if text.endswith(b",") and len(text) > 1:
            text = text[:-1].rstrip()
        return self.window.take_one(start + len(text), Reason.MALFORMED_JSON)

    def _take_rest(self, open_end: bool) -> Block:
        """Nothing that follows is a record: the end of the file, or 64 MiB without one."""
        window = self.window
        if not window.at_end:
            return window.take_one(len(window.data), Reason.OVERSIZED_RECORD)
        if open_end or window.truncated:
            self.cut_off = True
            return window.take_one(len(window.data), Reason.TRUNCATED_FILE)
        match = _ARRAY_END.search(window.data, max(window.position + 1, len(window.data) - 64))
        return window.take_one(match.start() if match else len(window.data), Reason.MALFORMED_JSON)

    def _resume(self, broken: int, open_end: bool) -> int | None:
        """Where the next sound record begins after the element at the position, which breaks at ``broken``."""
        window = self.window
        data, start = window.data, window.position
        if open_end and not window.at_end:
            if len(data) - start < PATIENCE_BYTES or data[start : start + 1] != self.opening.lstrip()[1:].lstrip()[:1]:
                return None
            return self._after_opening(data.find(self.opening, start + 1))
        after = start + 1 if data[start : start + 1] == b"{" else max(broken, start + 1)
        for match in _RESUME.finditer(data, after):
            end, complete = _scan(data, match.end())
            if complete and _is_record(data[match.end() : end]):
                return match.end()
        return None

    def _after_opening(self, found: int) -> int | None:
        return None if found < 0 else _SEPARATORS.match(self.window.data, found).end()


def _locate(data: bytes, position: int, end: int, records: list, lengths: np.ndarray) -> np.ndarray:
    """Where the parsed elements begin: all at once if all separators are equal, as a program writes them."""
    first = _SEPARATORS.match(data, position).end()
    separator = _SEPARATORS.match(data, first + int(lengths[0])).group()
    starts = first + np.concatenate(([0], np.cumsum(lengths[:-1] + len(separator))))
    if len(records) == 1 or _separated_by(data, separator, starts, lengths, end):
        return starts
    for index, record in enumerate(records):
        first = _SEPARATORS.match(data, first).end()
        starts[index] = first
        first += len(record)
    return starts


def _separated_by(data: bytes, separator: bytes, starts: np.ndarray, lengths: np.ndarray, end: int) -> bool:
    """Whether each element is followed by exactly ``separator`` and the next one: ``starts`` is right, by induction."""
    if starts[-1] + lengths[-1] > end:
        return False
    view = np.frombuffer(data, np.uint8)
    stops = (starts + lengths)[:-1]
    same = all((view[stops + index] == byte).all() for index, byte in enumerate(separator))
    return same and not _IS_SEPARATOR[view[starts[1:]]].any()


def _scan(data: bytes, start: int) -> tuple[int, bool]:
    """The end of the value at ``start`` and True; or where it breaks (the end of data if it may go on) and False."""
    if data[start : start + 1] not in (b"{", b"["):
        match = _SCALAR.match(data, start)
        complete = match is not None and _AFTER_SCALAR.match(data, match.end()) is not None
        return (match.end(), True) if complete else (start, False)
    stack: list[int] = []
    for match in _TOKEN.finditer(data, start):
        if not _fits(data, match, stack):
            place = match.start()
            return (len(data), False) if _reaches_end(data, match) else (place, False)
        if not stack:
            return match.end(), True
    return len(data), False


def _fits(data: bytes, match: re.Match, stack: list[int]) -> bool:
    """Whether a bracket or string may stand where it stands; keeps the stack of open brackets."""
    last = data[match.end() - 1]
    if last == ord('"'):
        return match.end() - match.start() > 1 and _AFTER_STRING.match(data, match.end()) is not None
    if last in _CLOSER:
        before = match.group(1)
        in_object = stack and stack[-1] == ord("{")
        if stack and (before != b":" if in_object else before == b":"):
            return False
        stack.append(last)
        return True
    return bool(stack) and _CLOSER[stack.pop()] == last


def _reaches_end(data: bytes, match: re.Match) -> bool:
    """Whether what does not fit is only the beginning of something, cut off by the end of the data."""
    if match.group() == b'"':
        return _OPEN_STRING.match(data, match.end()) is not None
    return data[match.end() - 1] == ord('"') and _NEARLY_END.match(data, match.end()) is not None
