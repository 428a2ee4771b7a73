"""Files -> blocks of records, streamed: JSON array, JSON Lines, objects one after another; plain, .gz, .zst.

In: a `Source` (a file, or a part of a large one). Out: `Block`s: the bytes of each record with offset, length and line,
and, for what is no record, a reason. Nothing is skipped: every byte is part of a record or a separator.
The form is found by looking at the first 4 MiB, not at the name of the file. Memory: a window of 4 MiB and its records,
whatever the size of the file; a record longer than 64 MiB is rejected. JSON Lines are cut at newlines (400 MB/s). The
elements of an array, or values one after another, are cut fast while they are sound and with care if they are not:

    1. A window of up to 4 MiB is cut at the last place that *looks like* a border between two elements.
    2. `[` + window + `]` is parsed into raw elements (1 GB/s). If it is valid JSON, the guess was right: a parser that
       comes to the end of a complete value there would do so in the whole file too. No structural scan is needed.
    3. If not, the elements before the place of the error are taken in the same way, and the next one is scanned with
       care (20-50 MB/s): a broken element ends where the next one begins, so one bad record costs itself alone.

That costs about 0.5 GB/s, and each broken element about 0.1 ms.
"""

import re
from collections.abc import Iterator
from itertools import chain, islice

import msgspec
import numpy as np

from data_prep.records import source
from data_prep.records.normalise import Decoder, normalise
from data_prep.records.reasons import Reason
from data_prep.records.source import Block, Form, Piece, Source, Window
from data_prep.records.turns import Rejected

HEAD_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"
MIN_WINDOW_BYTES = 32 << 10
MAX_RECORD_BYTES = 64 << 20
PATIENCE_BYTES = 256 << 10  # an element open for longer than this is doubted: a known border inside ends it
MAX_CANDIDATES = 1000  # places where a record could begin after a broken one that are looked at
MAX_DEPTH = 1000

_SEPARATORS = re.compile(rb"[\s,]*+")
_INSIDE = rb'[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+'  # of a string; a raw control character ends the belief in it
_SCALAR = re.compile(rb'"%b"|[^\s,\[\]{}"]++' % _INSIDE)
_TOKEN = re.compile(rb'"%b"|([:,]?)\s*+([{\[])|[}\]]|"' % _INSIDE)
_OPEN_STRING = re.compile(rb"%b\\?\Z" % _INSIDE)
_AFTER_STRING = re.compile(rb"\s*+[:,\]}]")
_AFTER_SCALAR = re.compile(rb"\s*+(?:[,\]]|\Z)")
_NEARLY_END = re.compile(rb"\s*+\Z")
_BORDER = re.compile(rb"[}\]]\s*+,\s*+(?=[{\[])")
_RESUME = re.compile(rb"(?:[}\]\"]\s*+,|\n)\s*+(?=[{\[])")
_OPENING = re.compile(rb'\s*+,\s*+[{\[](?:\s*+[{\[])*+\s*+"(?:[^"\\\x00-\x1f]){0,64}"')
_ARRAY_END = re.compile(rb"\s*+\]\s*+\Z")
_CLOSER = {ord("{"): ord("}"), ord("["): ord("]")}

_IS_SEPARATOR = np.isin(np.arange(256), list(b" \t\r\n\f\v,"))
_decode_elements = msgspec.json.Decoder(list[msgspec.Raw]).decode
_ERROR_PLACE = re.compile(r"\(byte (\d+)\)")


def read_blocks(stream: Source) -> Iterator[Block]:
    """All records of a piece in file order; what is no record comes with a reason."""
    window = Window(stream)
    window.fill(HEAD_BYTES)
    if stream.piece.first and window.data.startswith(BOM):
        window.skip(len(BOM))
    form = stream.piece.form or find_form(window.data[window.position :])
    if form == "lines":
        yield from _lines(window)
    else:
        yield from Elements(window, stream.piece, form).blocks()


def find_form(head: bytes) -> Form:
    """What the first bytes of a file say that it is.

    An array on one line with another line after it is a JSON Lines record (a list of turns); alone it is an array.
    An object that does not end with its line is JSON Lines all the same if a later line is an object.
    """
    head = head.lstrip()
    line, _, rest = head.partition(b"\n")
    if head.startswith(b"["):
        return "lines" if rest.strip() and is_json(line) else "array"
    if not head.startswith(b"{") or not rest or is_json(line):
        return "lines"
    following = rest.split(b"\n", 64)[:64]
    return "lines" if any(text.startswith(b"{") and is_json(text) for text in following) else "values"


def find_opening(head: bytes) -> bytes:
    """How an element of an array begins after another, separator included (see `Piece`); empty if that is not seen."""
    first = _after_separators(head, head.find(b"[") + 1)
    for start in chain((first,), (match.end() for match in islice(_RESUME.finditer(head, first), 64))):
        end, complete = scan(head, start)
        if complete and (match := _OPENING.match(head, end)):
            return match.group()
    return b""


def is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _lines(window: Window) -> Iterator[Block]:
    size, cut_off = source.WINDOW_BYTES, False
    while have := window.fill(size):
        end = len(window.data) if window.at_end else window.data.rfind(b"\n", window.position) + 1
        if end > window.position:
            size, block = source.WINDOW_BYTES, _cut_lines(window, end)
            cut_off = Reason.TRUNCATED_FILE in block.faults.values()
            if block.records:
                yield block
            del block  # freed before the next is cut
        elif have >= MAX_RECORD_BYTES:
            yield window.take_one(len(window.data), Reason.OVERSIZED_RECORD)
        else:
            size = min(2 * have, MAX_RECORD_BYTES)
    if window.truncated and not cut_off:
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
    block.faults |= dict.fromkeys(np.flatnonzero(block.lengths > MAX_RECORD_BYTES).tolist(), Reason.OVERSIZED_RECORD)
    if records and stops[-1] == end and window.at_end and _is_cut_off(records[-1]):
        block.faults[len(records) - 1] = Reason.TRUNCATED_FILE
    return block


def _without_blank(records: list[bytes]) -> tuple[list[bytes], np.ndarray | slice]:
    """Drop the lines of white space alone; the first byte tells of nearly all others that they are none."""
    blank = {index for index, record in enumerate(records) if record[:1].isspace() and record.isspace()}
    if not blank:
        return records, slice(None)
    kept = np.array([index for index in range(len(records)) if index not in blank], np.int64)
    return [records[index] for index in kept], kept


def _is_cut_off(record: bytes) -> bool:
    """Whether a last line without newline is the beginning of a record."""
    start = len(record) - len(record.lstrip())
    return record[start : start + 1] in (b"{", b"[") and not is_json(record) and scan(record, start)[0] == len(record)


class Elements:
    """The elements of an array, or objects one after another: the state is the window and what was learned so far."""

    def __init__(self, window: Window, piece: Piece, form: Form):
        self.window = window
        self.piece = piece
        self.form = form
        self.opening = piece.opening or (find_opening(window.data) if form == "array" else b"")
        self.size = source.WINDOW_BYTES
        self.careful_until = 0  # offset in the source before which guessing is no use
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
        """Pass over separators and the ends of arrays.

        An array right behind another is read like it; after `],` the bracket was a stray one and the array goes on.
        """
        window = self.window
        while True:
            start = window.position
            end = _after_separators(window.data, start)
            if self.form == "array" and self.closed and b"," in window.data[start:end]:
                self.closed = False
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
        if self.form != "array" or self.closed or self.window.base + self.window.position < self.careful_until:
            return None
        self.window.fill(self.size)
        position = self.window.position
        limit = min(position + self.size, len(self.window.data))
        for end in self._borders(limit):
            block, broken = self._parse(end)
            if block:
                self.size = min(4 * self.size, source.WINDOW_BYTES)
                return block
            if broken and broken < end - 1:
                self.size = max(MIN_WINDOW_BYTES, min(self.size, 4 * (broken - position)))
                return self._before(broken)
        return self._smaller()

    def _before(self, broken: int) -> Block | None:
        """The elements before the one with an error at ``broken``; None if it is the next one."""
        for end in self._borders(broken):
            block, _ = self._parse(end)
            if block:
                return block
        return None

    def _smaller(self) -> Block | None:
        """No guess was right and no place was named: try less, down to a window that is gone through with care."""
        if self.size <= MIN_WINDOW_BYTES:
            self.careful_until = self.window.base + self.window.position + MIN_WINDOW_BYTES
            return None
        self.size = max(self.size // 8, MIN_WINDOW_BYTES)
        return self._fast()

    def _borders(self, limit: int) -> Iterator[int]:
        """Guesses where an element ends before ``limit``, the best first."""
        data, position = self.window.data, self.window.position
        if limit == len(data) and self.window.at_end and (match := _ARRAY_END.search(data, max(position, limit - 64))):
            yield match.start()
        if self.opening and (end := data.rfind(self.opening, position, limit)) > position:
            yield end
        tail = max(position, limit - MIN_WINDOW_BYTES)
        ends = [match.start() + 1 for match in _BORDER.finditer(data, tail, limit)]
        yield from reversed(ends[-4:])

    def _parse(self, end: int) -> tuple[Block | None, int | None]:
        """The elements up to ``end``; or None and the place of the error, if the parser names one."""
        window = self.window
        try:
            records = _decode_elements(b"".join((b"[", memoryview(window.data)[window.position : end], b"]")))
        except (msgspec.DecodeError, RecursionError) as error:
            place = _ERROR_PLACE.search(str(error))
            return None, place and window.position + int(place.group(1)) - 1
        if not records:
            return None, None
        lengths = np.fromiter(map(len, records), np.int64, len(records))
        starts = _locate(window.data, window.position, end, records, lengths)
        return window.take(records, starts, lengths, end), None

    def _careful(self) -> Block:
        """The one element at the position, sound or broken. Takes more of the source only as long as it must."""
        window = self.window
        while True:
            limit = len(window.data) if window.at_end else window.position + MAX_RECORD_BYTES
            end, complete = scan(window.data, window.position)
            if complete:
                return self._take_complete(end)
            open_end = end == len(window.data)
            if (resume := self._resume(end, open_end)) is not None:
                return self._take_broken(resume)
            have = len(window.data) - window.position
            if window.at_end or len(window.data) >= limit:
                return self._take_rest(open_end)
            window.fill(min(2 * have, MAX_RECORD_BYTES))

    def _take_complete(self, end: int) -> Block:
        window = self.window
        if end - window.position > MAX_RECORD_BYTES:
            return window.take_one(end, Reason.OVERSIZED_RECORD)
        if self.careful_until and not is_json(window.data[window.position : end]):
            self.careful_until = 0  # this was what could not be guessed
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
        """Where the next element begins after the one at the position, which breaks at ``broken``; None if unknown.

        Either the text by which elements of this array begin stands there, or what stands there is a valid record.
        """
        data, start = self.window.data, self.window.position
        known = self._known_opening(start)
        if open_end and not self.window.at_end:
            return known if len(data) - start >= PATIENCE_BYTES else None
        after = start + 1 if data[start : start + 1] == b"{" else max(broken, start + 1)
        end = len(data) if known is None else known
        for match in islice(_RESUME.finditer(data, after, end), MAX_CANDIDATES):
            end_of_candidate, complete = scan(data, match.end())
            if complete and _is_record(data[match.end() : end_of_candidate]):
                return match.end()
        return known

    def _known_opening(self, start: int) -> int | None:
        """Where the known opening stands next; in a list, objects may begin as the elements around it do."""
        data = self.window.data
        bracket = self.opening.lstrip()[1:].lstrip()[:1]
        if not self.opening or (data[start : start + 1] == b"[" and bracket == b"{"):
            return None
        found = data.find(self.opening, start + 1)
        return None if found < 0 else _after_separators(data, found)


def _is_record(data: bytes) -> bool:
    for kind in ("instruction", "pretraining"):
        try:
            normalise(Decoder().decode(data), kind, [])
        except Rejected:
            continue
        return True
    return False


def _locate(data: bytes, position: int, end: int, records: list, lengths: np.ndarray) -> np.ndarray:
    """Where the parsed elements begin: all at once if all separators are equal, as a program writes them."""
    first = _after_separators(data, position)
    after_first = first + int(lengths[0])
    separator = data[after_first : _after_separators(data, after_first)]
    starts = first + np.concatenate(([0], np.cumsum(lengths[:-1] + len(separator))))
    if len(records) == 1 or _separated_by(data, separator, starts, lengths, end):
        return starts
    for index, record in enumerate(records):
        first = _after_separators(data, first)
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


def _after_separators(data: bytes, position: int) -> int:
    """Where the separators (perhaps none) at a position end."""
    match = _SEPARATORS.match(data, position)
    assert match is not None, "the pattern matches the empty string too"
    return match.end()


def scan(data: bytes, start: int) -> tuple[int, bool]:
    """The end of the value at ``start`` and True; or where it breaks (the end of data if it may go on) and False."""
    if data[start : start + 1] not in (b"{", b"["):
        match = _SCALAR.match(data, start)
        if match is None or _AFTER_SCALAR.match(data, match.end()) is None:
            return start, False
        return match.end(), True
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
        return len(stack) < MAX_DEPTH
    return bool(stack) and _CLOSER[stack.pop()] == last


def _reaches_end(data: bytes, match: re.Match) -> bool:
    """Whether what does not fit is only the beginning of something, cut off by the end of the data."""
    if match.group() == b'"':
        return _OPEN_STRING.match(data, match.end()) is not None
    return data[match.end() - 1] == ord('"') and _NEARLY_END.match(data, match.end()) is not None
