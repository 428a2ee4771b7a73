"""The story of one input record: what became of it and why, its text, its tokens with their mask, its rows and steps.

In: a plan directory, its tokenizer, and FILE:LINE or a text to look for. Out: `Story`, plain data, and a rendering.
Cost: FILE:LINE reads the ledger; a text reads all records (1 GB/s).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Group
from rich.text import Text

from data_prep import store
from data_prep.errors import PandaError
from data_prep.inspection.render import Shown, as_terminal, show_example
from data_prep.plan.order import position_of
from data_prep.plan.plan_file import Rows, open_rows, rows_file
from data_prep.plan.reader import LEDGER_FILE
from data_prep.records.reasons import Reason
from data_prep.records.shard import read_arrow
from data_prep.tokens.layouts import Role
from data_prep.tokens.tokenizer import LoadedTokenizer

_EXPLANATIONS = {reason.value: reason.explanation for reason in Reason}
MAX_FOUND = 20
MAX_QUARANTINE = 2000  # bytes of a rejected record that are shown


@dataclass(frozen=True)
class Course:
    """How rows become steps: what `data_prep.plan.order` needs."""

    rows_per_step: int
    seed: int
    epochs: int


@dataclass(frozen=True)
class Placement:
    """A segment of the record in a row, and the (epoch, step of the epoch) in which the row is trained, from 0."""

    row: int
    start: int
    length: int
    others: int  # segments of other records in the row
    trained: list[tuple[int, int]]


@dataclass(frozen=True)
class Story:
    """All that is known of one record. ``entry`` is its line of the ledger."""

    place: str
    entry: dict[str, Any]
    explanation: str
    texts: list[tuple[str, str]]  # (role, text) of the normal form
    raw: str | None  # of a rejected record
    first: str | None  # of a duplicate: where the record that was kept is
    shown: Shown | None
    placements: list[Placement] = field(default_factory=list)


@dataclass(frozen=True)
class _Opened:
    """A plan with its ledger."""

    path: Path
    manifest: dict[str, Any]
    ledger: pa.Table

    def tokens_dir(self, shard: int) -> Path:
        return (self.path / self.manifest["shards"][shard]).resolve()

    def records_dir(self, shard: int) -> Path:
        tokens = self.tokens_dir(shard)
        return tokens.parent.parent / "records" / store.open_manifest(tokens)["records"]


def stories_at(plan_dir: Path, place: str, tokenizer: LoadedTokenizer, course: Course | None = None) -> list[Story]:
    """Stories of the records that start on a line, given as FILE:LINE; FILE may be the end of the path.

    :raises PandaError: no such file or line in this corpus.
    """
    opened = _open(plan_dir)
    return [_story(opened, index, tokenizer, course) for index in _lines_at(opened.ledger, place)]


def entries_at(plan_dir: Path, place: str) -> list[dict[str, Any]]:
    """Ledger lines of the records that start on a line, as `stories_at` finds them."""
    ledger = _open(plan_dir).ledger
    return [ledger.slice(index, 1).to_pylist()[0] for index in _lines_at(ledger, place)]


def _lines_at(ledger: pa.Table, place: str) -> list[int]:
    file, _, line = place.rpartition(":")
    if not file or not line.isdigit():
        raise PandaError(f"why: {place!r} is not FILE:LINE, such as dataset/instruction_tuning/a.jsonl:42")
    column = ledger["file"].combine_chunks()
    names = [name for name in pc.unique(column.cast(pa.string())).to_pylist() if _ends_with(name, file)]
    if not names:
        raise PandaError(f"why: no file {file!r} in this corpus")
    mine = pc.is_in(column.cast(pa.string()), pa.array(names)).to_numpy(zero_copy_only=False)
    lines = ledger["line"].to_numpy()
    found = np.flatnonzero(mine & (lines == int(line)))
    if not len(found):  # inside a record of several lines
        before = np.flatnonzero(mine & (lines < int(line)))
        found = before[lines[before] == lines[before].max()] if len(before) else before
    if not len(found):
        raise PandaError(f"why: no record at {place}; {names[0]} has records from line {lines[mine].min()} on")
    return found[:MAX_FOUND].tolist()


def stories_with(plan_dir: Path, text: str, tokenizer: LoadedTokenizer, course: Course | None = None) -> list[Story]:
    """Stories of the first valid records that contain a text.

    :raises PandaError: none does.
    """
    opened = _open(plan_dir)
    shards = opened.ledger["shard"].to_numpy()
    examples = opened.ledger["example"].to_numpy()
    found: list[int] = []
    for shard in range(len(opened.manifest["shards"])):
        numbers = records_with(opened.records_dir(shard), text)
        mine = np.flatnonzero(shards == shard)
        found += mine[np.isin(examples[mine], numbers)].tolist()
        if len(found) >= MAX_FOUND:
            break
    if not found:
        raise PandaError(f"why: no valid record contains {text!r}")
    return [_story(opened, index, tokenizer, course) for index in found[:MAX_FOUND]]


def _ends_with(name: str, file: str) -> bool:
    wanted = Path(file).parts
    return Path(name).parts[-len(wanted) :] == wanted or Path(name) == Path(file).absolute()


def records_with(directory: Path, text: str) -> np.ndarray:
    """Numbers of the valid records that contain a text."""
    numbers, first = [], 0
    for chunk in read_arrow(directory / "records.arrow")["texts"].chunks:
        hits = np.flatnonzero(pc.match_substring(chunk.values, text).to_numpy(zero_copy_only=False))
        numbers.append(first + np.searchsorted(chunk.offsets.to_numpy(), hits, side="right") - 1)
        first += len(chunk)
    return np.unique(np.concatenate([np.zeros(0, np.int64), *numbers]))


def _open(plan_dir: Path) -> _Opened:
    plan_dir = Path(plan_dir).resolve()
    return _Opened(plan_dir, store.open_manifest(plan_dir), read_arrow(plan_dir / LEDGER_FILE))


def _story(opened: _Opened, index: int, tokenizer: LoadedTokenizer, course: Course | None) -> Story:
    entry = opened.ledger.slice(index, 1).to_pylist()[0]
    place = f"{entry['file']}:{entry['line']}"
    known = entry["shard"] >= 0
    shown = None
    if known:
        shown = show_example(opened.tokens_dir(entry["shard"]), entry["example"], tokenizer, place)
    return Story(
        place=place,
        entry={**entry, "hash": entry["hash"].hex() if entry["hash"] else None},
        explanation="" if entry["reason"] is None else _EXPLANATIONS[entry["reason"]],
        texts=_texts(opened.records_dir(entry["shard"]), entry["example"]) if known else [],
        raw=None if known else _raw(opened, index),
        first=_kept(opened, entry) if entry["reason"] == Reason.DUPLICATE else None,
        shown=shown,
        placements=_placements(opened, entry, course) if entry["verdict"] == "accepted" else [],
    )


def _texts(directory: Path, example: int) -> list[tuple[str, str]]:
    record = read_arrow(directory / "records.arrow").slice(example, 1).to_pylist()[0]
    return [(Role(role).name.lower(), text) for role, text in zip(record["roles"], record["texts"], strict=True)]


def _raw(opened: _Opened, index: int) -> str:
    """A rejected record from the quarantine of its unit: the ledger of the corpus is that of the units in order."""
    first = 0
    for shard in range(len(opened.manifest["shards"])):
        directory = opened.records_dir(shard)
        count = store.open_manifest(directory)["records"]
        if index < first + count:
            return _quarantined(directory, index - first)
        first += count
    raise AssertionError(f"ledger line {index} is in no unit")


def _quarantined(directory: Path, number: int) -> str:
    ledger = read_arrow(directory / "ledger.arrow")
    rejected = pc.is_valid(ledger["reason"]).to_numpy()
    lengths = ledger["length"].to_numpy()
    start = int((lengths[:number] + 1)[rejected[:number]].sum())
    with open(directory / "quarantine.bin", "rb") as stream:
        stream.seek(start)
        data = stream.read(min(int(lengths[number]), MAX_QUARANTINE))
    return data.decode("utf-8", "backslashreplace")


def _kept(opened: _Opened, entry: dict[str, Any]) -> str:
    same = opened.ledger.filter(pc.equal(opened.ledger["hash"], pa.scalar(entry["hash"], pa.binary(16))))
    first = same.slice(0, 1).to_pylist()[0]
    return f"{first['file']}:{first['line']}"


def _placements(opened: _Opened, entry: dict[str, Any], course: Course | None) -> list[Placement]:
    rows = open_rows(opened.path / rows_file(entry["split"]))
    segments = np.flatnonzero((rows.shard == entry["shard"]) & (rows.example == entry["example"]))
    row_of = np.searchsorted(rows.row_offsets, segments, side="right") - 1
    steps = _steps(rows, row_of, course) if course and entry["split"] == "train" else np.zeros((0, len(segments)), int)
    return [
        Placement(
            row=int(row),
            start=int(rows.start[segment]),
            length=int(rows.length[segment]),
            others=int(rows.row_offsets[row + 1] - rows.row_offsets[row]) - int((row_of == row).sum()),
            trained=[(epoch, int(step)) for epoch, step in enumerate(steps[:, number])],
        )
        for number, (segment, row) in enumerate(zip(segments, row_of, strict=True))
    ]


def _steps(rows: Rows, row_of: np.ndarray, course: Course) -> np.ndarray:
    """Step of each row in every epoch: ``(epochs, n) int64``."""
    per_epoch = (
        position_of(rows.num_rows, course.rows_per_step, course.seed, epoch, row_of) for epoch in range(course.epochs)
    )
    return np.array(list(per_epoch)).reshape(course.epochs, len(row_of))


def story_text(story: Story) -> Group:
    """For a terminal."""
    entry = story.entry
    head = Text(f"{story.place}  ", style="bold")
    head.append(entry["verdict"], style="bold green" if entry["verdict"] == "accepted" else "bold red")
    lines = [f"source {entry['source']}, bytes {entry['offset']} to {entry['offset'] + entry['length']}"]
    if entry["hash"]:
        lines.append(f"content hash {entry['hash']}")
    if entry["reason"]:
        lines.append(f"reason: {entry['reason']}: {story.explanation}")
    if story.first:
        lines.append(f"the record that is kept: {story.first}")
    if entry["verdict"] == "accepted":
        lines.append(f"{entry['split']}, {entry['copies']} times in the plan; {entry['cut_tokens']} tokens cut")
    lines += [_placement_text(placement) for placement in story.placements]
    lines += [f"{role}: {text}" for role, text in story.texts]
    if story.raw is not None:
        lines.append(f"as found: {story.raw}")
    return Group(head, *map(Text, lines), *([as_terminal(story.shown)] if story.shown else []))


def _placement_text(placement: Placement) -> str:
    part = f"row {placement.row}: tokens {placement.start} to {placement.start + placement.length}"
    steps = ", ".join(f"epoch {epoch} step {step}" for epoch, step in placement.trained)
    return f"{part}, beside {placement.others} other segments" + (f"; trained in {steps}" if steps else "")
