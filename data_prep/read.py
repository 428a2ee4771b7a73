"""Files -> blocks of records, streamed: JSON array, JSON Lines, objects one after another; plain, .gz, .zst.

In: a `Source` (a file, or a part of a large one). Out: `Block`s: the bytes of each record with offset, length and line,
and, for what is no record, a reason. Nothing is skipped: every byte is part of a record or a separator.
The form is found by looking at the first 4 MiB, not at the name of the file. JSON Lines are cut at newlines; the rest
is in `data_prep.elements`. Cost: about 400 MB/s. Memory: a window of 4 MiB and its records, whatever the size of the
file; a record longer than 64 MiB is rejected.
"""

from collections.abc import Iterator

import numpy as np

from data_prep import source
from data_prep.elements import MAX_RECORD_BYTES, Elements, is_json, scan
from data_prep.ledger import Reason
from data_prep.source import Block, Form, Source, Window

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst")
HEAD_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"


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


def _lines(window: Window) -> Iterator[Block]:
    size, block = source.WINDOW_BYTES, None
    while have := window.fill(size):
        end = len(window.data) if window.at_end else window.data.rfind(b"\n", window.position) + 1
        if end > window.position:
            size, block = source.WINDOW_BYTES, _cut_lines(window, end)
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
    return record[start : start + 1] in (b"{", b"[") and not is_json(record) and scan(record, start)[0] == len(record)
