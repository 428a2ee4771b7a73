"""The story of one input record: what became of it and why, its text, its tokens with their mask, its rows and steps.

In: a plan directory, its tokenizer, and FILE:LINE or a text to look for. Out: `Story`, plain data, and a rendering.
Cost: FILE:LINE reads the ledger; a text reads all records (1 GB/s).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.console import Group
from rich.text import Text

from data_prep import store
from data_prep.errors import PandaError
from data_prep.inspection.render import Shown, as_terminal, show_example
from data_prep.plan.ledger import MAX_FOUND, Ledger, LedgerEntry, open_ledger, records_with
from data_prep.plan.order import position_of
from data_prep.plan.plan_file import Rows, open_rows, rows_file
from data_prep.records.build_unit import UNIT_LEDGER_FILE
from data_prep.records.reasons import Reason
from data_prep.records.shard import read_arrow
from data_prep.records.turns import Role
from data_prep.tokenizer import LoadedTokenizer

_EXPLANATIONS = {reason.value: reason.explanation for reason in Reason}
MAX_QUARANTINE = 2000  # bytes of a rejected record that are shown


@dataclass(frozen=True)
class StepOrder:
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
    entry: dict[str, Any]  # `LedgerEntry`, with the hash as text
    explanation: str
    texts: list[tuple[str, str]]  # (role, text) of the normal form
    raw: str | None  # of a rejected record
    first: str | None  # of a duplicate: where the record that was kept is
    shown: Shown | None
    placements: list[Placement] = field(default_factory=list)


def stories_at(plan_dir: Path, place: str, tokenizer: LoadedTokenizer, order: StepOrder | None = None) -> list[Story]:
    """Stories of the records that start on a line, given as FILE:LINE; FILE may be the end of the path.

    :raises PandaError: no such file or line in this corpus.
    """
    ledger = open_ledger(plan_dir)
    return [_story(ledger, index, tokenizer, order) for index in ledger.at(place)]


def stories_with(plan_dir: Path, text: str, tokenizer: LoadedTokenizer, order: StepOrder | None = None) -> list[Story]:
    """Stories of the first valid records that contain a text.

    :raises PandaError: none does.
    """
    ledger = open_ledger(plan_dir)
    shards = ledger.table["shard"].to_numpy()
    examples = ledger.table["example"].to_numpy()
    found: list[int] = []
    for shard in range(len(ledger.manifest["shards"])):
        numbers = records_with(ledger.records_dir(shard), text)
        mine = np.flatnonzero(shards == shard)
        found += mine[np.isin(examples[mine], numbers)].tolist()
        if len(found) >= MAX_FOUND:
            break
    if not found:
        raise PandaError(f"why: no valid record contains {text!r}")
    return [_story(ledger, index, tokenizer, order) for index in found[:MAX_FOUND]]


def _story(ledger: Ledger, index: int, tokenizer: LoadedTokenizer, order: StepOrder | None) -> Story:
    entry = ledger.entry(index)
    place = f"{entry['file']}:{entry['line']}"
    known = entry["shard"] >= 0
    shown = None
    if known:
        shown = show_example(ledger.tokens_dir(entry["shard"]), entry["example"], tokenizer, place)
    return Story(
        place=place,
        entry={**entry, "hash": entry["hash"].hex() if entry["hash"] else None},
        explanation="" if entry["reason"] is None else _EXPLANATIONS[entry["reason"]],
        texts=_texts(ledger, entry) if known else [],
        raw=None if known else _raw(ledger, index),
        first=_kept(ledger, entry) if entry["reason"] == Reason.DUPLICATE else None,
        shown=shown,
        placements=_placements(ledger, entry, order) if entry["verdict"] == "accepted" else [],
    )


def _texts(ledger: Ledger, entry: LedgerEntry) -> list[tuple[str, str]]:
    roles, texts = ledger.read_texts([entry])
    return [(Role(role).word, text) for role, text in zip(roles[0].as_py(), texts[0].as_py(), strict=True)]


def _raw(ledger: Ledger, index: int) -> str:
    """A rejected record from the quarantine of its unit: the ledger of the corpus is that of the units in order."""
    first = 0
    for shard in range(len(ledger.manifest["shards"])):
        directory = ledger.records_dir(shard)
        count = store.open_manifest(directory)["records"]
        if index < first + count:
            return _quarantined(directory, index - first)
        first += count
    raise AssertionError(f"ledger line {index} is in no unit")


def _quarantined(directory: Path, number: int) -> str:
    ledger = read_arrow(directory / UNIT_LEDGER_FILE)
    rejected = pc.is_valid(ledger["reason"]).to_numpy()
    lengths = ledger["length"].to_numpy()
    start = int((lengths[:number] + 1)[rejected[:number]].sum())
    with open(directory / "quarantine.bin", "rb") as stream:
        stream.seek(start)
        data = stream.read(min(int(lengths[number]), MAX_QUARANTINE))
    if not data and lengths[number] > 0:
        return "(its bytes were not kept: too many were rejected in this unit; they are in the file itself)"
    return data.decode("utf-8", "backslashreplace")


def _kept(ledger: Ledger, entry: LedgerEntry) -> str:
    assert entry["hash"] is not None, "a duplicate is a record that could be read"
    first = ledger.with_hash(entry["hash"]).slice(0, 1).to_pylist()[0]
    return f"{first['file']}:{first['line']}"


def _placements(ledger: Ledger, entry: LedgerEntry, order: StepOrder | None) -> list[Placement]:
    assert entry["split"] is not None, "an accepted record is in a split"
    rows = open_rows(ledger.plan_dir / rows_file(entry["split"]))
    segments, row_of = rows.segments_of(entry["shard"], entry["example"])
    steps = _steps(rows, row_of, order) if order and entry["split"] == "train" else np.zeros((0, len(segments)), int)
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


def _steps(rows: Rows, row_of: np.ndarray, order: StepOrder) -> np.ndarray:
    """Step of each row in every epoch: ``(epochs, n) int64``."""
    per_epoch = (
        position_of(rows.num_rows, order.rows_per_step, order.seed, epoch, row_of) for epoch in range(order.epochs)
    )
    return np.array(list(per_epoch)).reshape(order.epochs, len(row_of))


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
