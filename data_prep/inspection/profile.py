"""What a corpus looks like, small enough to be kept with every version: counts, and some records described.

In: a plan. Out: `Profile`; `save` and `load` make a file of it (half a megabyte), so that a later corpus can be
compared when this one is gone. The records with the smallest content hashes are described: an unchanged record in both
corpora or in neither, so that two corpora share their samples as they share their records. More of the hashes are kept
as well, so that `new_records` finds records that are new in a later corpus, also when these are one in a hundred. No
text is kept, only hashes and counts. A prompt is all texts of a record that are no target, an answer all that are; a
document is an answer without a prompt.
Cost: a pass over four columns of the ledger, 0.2 us a record; 0.2 s of CPU for the texts of the sample, of which the
first `HEAD` characters are looked at. Memory: 40 bytes a record, for a moment.
"""

import json
import re
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.errors import PandaError
from data_prep.plan.ledger import Ledger, open_ledger
from data_prep.records.build_unit import RECORDS_FILE
from data_prep.records.reasons import Reason
from data_prep.records.shard import read_arrow
from data_prep.records.turns import Role

FORMAT = 1
DESCRIBED = 4096  # records, about
KNOWN = 32_768  # hashes, about
SHOWN = 5  # rows
DUPLICATE = Reason.DUPLICATE.value
HEAD = 512  # characters of a prompt, and of an answer
OPENING = 24  # characters: what prompts of one template have in common
BUCKETS = 128  # counts of runs of three bytes, of a prompt and of an answer each
SCRIPTS = ("no letters", "latin", "greek", "cyrillic", "hebrew", "arabic", "indic", "thai", "kana", "han", "hangul")
_BLOCKS: tuple[tuple[int, int, str], ...] = (
    (0x41, 0x5A, "latin"), (0x61, 0x7A, "latin"), (0xC0, 0x24F, "latin"), (0x1E00, 0x1EFF, "latin"),
    (0x370, 0x3FF, "greek"), (0x400, 0x52F, "cyrillic"), (0x590, 0x5FF, "hebrew"), (0x600, 0x77F, "arabic"),
    (0x900, 0xDFF, "indic"), (0xE00, 0xE7F, "thai"), (0x3040, 0x30FF, "kana"), (0x3400, 0x9FFF, "han"),
    (0xAC00, 0xD7AF, "hangul"),
)  # fmt: skip
_SCRIPT_OF = np.zeros(1 << 16, np.uint8)
for _first, _last, _name in _BLOCKS:
    _SCRIPT_OF[_first : _last + 1] = SCRIPTS.index(_name)
_CP1252 = "\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122"
_BROKEN = re.compile(
    f"[\ufffd\x80-\x9f]|[ÂÃ][\xa0-\xbf]|â€|ï»¿|锟斤拷|[à-ï][\xa0-\xbf{_CP1252}]{{2}}"
)  # what UTF-8 looks like when it was read as something else
_ENDINGS = frozenset(".!?…。！？\"'”’»)]}）】」』》`*|>;:：；~")
_TARGETS = frozenset((Role.ASSISTANT, Role.TITLE, Role.TEXT))


SCHEMA = pa.schema([
    ("key", pa.uint64()), ("row", pa.int64()), ("source", pa.int16()), ("prompt_bytes", pa.int64()),
    ("answer_bytes", pa.int64()), ("script", pa.uint8()), ("is_complete", pa.bool_()), ("is_broken", pa.bool_()),
    ("opening", pa.uint32()), ("answer", pa.uint32()), ("grams", pa.binary(2 * BUCKETS)),
])  # fmt: skip
"""Of the file: the fields of `Sample`; the rest of the profile is JSON in its metadata."""


@dataclass(frozen=True)
class Sample:
    """Records described, one entry each, by ascending key."""

    key: np.ndarray  # (n,) uint64, first bytes of the content hash
    row: np.ndarray  # (n,) int64, in the ledger of the plan
    source: np.ndarray  # (n,) int16, index into the sources of the profile
    prompt_bytes: np.ndarray  # (n,) int64
    answer_bytes: np.ndarray  # (n,) int64
    script: np.ndarray  # (n,) uint8, index into SCRIPTS: that of most letters of the answer
    is_complete: np.ndarray  # (n,) bool, the answer ends as texts end
    is_broken: np.ndarray  # (n,) bool, read in another encoding than it was written in
    opening: np.ndarray  # (n,) uint32, hash of how the prompt begins
    answer: np.ndarray  # (n,) uint32, hash of the head of the answer
    grams: np.ndarray  # (n, 2 * BUCKETS) uint8, of the prompt, of the answer

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, which: np.ndarray) -> "Sample":
        return Sample(*(getattr(self, one.name)[which] for one in fields(self)))


@dataclass(frozen=True)
class Counts:
    """Of the input records of one source."""

    records: int
    rejected: dict[str, int]  # by reason
    duplicates: int  # the same content as an earlier record, of whatever source
    rows: dict[str, list[int]]  # of the ledger: the last few of each of these

    @property
    def different(self) -> int:
        """Usable records, each content once."""
        return self.records - sum(self.rejected.values()) - self.duplicates

    def of_reason(self, reason: str) -> int:
        """Records that were rejected for it, or are duplicates."""
        return self.duplicates if reason == DUPLICATE else self.rejected.get(reason, 0)


@dataclass(frozen=True)
class Profile:
    """The corpus of one plan."""

    counts: dict[str, Counts]  # by source; the order is that of `Sample.source`
    bound: int  # records whose key is below are described
    sample: Sample
    known_bound: int
    known: np.ndarray  # (m,) uint64, ascending: the keys below that bound

    @property
    def sources(self) -> list[str]:
        return list(self.counts)


@dataclass(frozen=True)
class _Rows:
    """The columns of a ledger that are asked."""

    key: np.ndarray  # (n,) uint64 of usable records
    row: np.ndarray  # (n,) int64
    source: np.ndarray  # (n,) int16
    counts: dict[str, Counts]


def take_profile(plan_dir: Path) -> Profile:
    """The profile of what a plan was made from, whether it is trained on or left out."""
    ledger = open_ledger(plan_dir)
    rows = _rows(ledger)
    bound, known_bound = (_bound(size, len(rows.key)) for size in (DESCRIBED, KNOWN))
    return Profile(
        rows.counts, bound, _described(ledger, rows, rows.key < np.uint64(bound)), known_bound,
        np.sort(rows.key[rows.key < np.uint64(known_bound)]),
    )  # fmt: skip


def new_records(plan_dir: Path, before: Profile) -> Sample:
    """Some of the records of a plan that were not in an earlier corpus, at most `DESCRIBED` of them."""
    ledger = open_ledger(plan_dir)
    rows = _rows(ledger)
    asked = np.flatnonzero(rows.key < np.uint64(before.known_bound))
    new = asked[~np.isin(rows.key[asked], before.known)]
    chosen = np.zeros(len(rows.key), bool)
    chosen[new[np.argsort(rows.key[new])[:DESCRIBED]]] = True
    return _described(ledger, rows, chosen)


def places(plan_dir: Path, rows: list[int]) -> list[str]:
    """``file:line`` of rows of the ledger of a plan."""
    table = open_ledger(plan_dir).table.select(["file", "line"])
    found = [table.slice(row, 1).to_pylist()[0] for row in rows]
    return [f"{one['file']}:{one['line']}" for one in found]


def save(profile: Profile, path: Path) -> None:
    """Write it as one Arrow file."""
    columns = {one.name: getattr(profile.sample, one.name) for one in fields(Sample)}
    grams = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * BUCKETS), len(profile.sample), [None, pa.py_buffer(np.ascontiguousarray(columns.pop("grams")))]
    )
    facts = {
        "format": FORMAT,
        "counts": {source: asdict(counts) for source, counts in profile.counts.items()},
        "bound": profile.bound,
        "known_bound": profile.known_bound,
        "known": profile.known.tobytes().hex(),
    }
    table = pa.table({**columns, "grams": grams}, schema=SCHEMA).replace_schema_metadata({"profile": json.dumps(facts)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)


def load(content: bytes) -> Profile:
    """Read what `save` has written.

    :raises PandaError: it is damaged, or of a later format.
    """
    try:
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all().combine_chunks()
        table.validate(full=True)
        if not table.schema.equals(SCHEMA):
            raise ValueError("other columns")
        facts: dict[str, Any] = json.loads((table.schema.metadata or {})[b"profile"])
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}, this code reads {FORMAT}")
        columns = {name: table[name].to_numpy() for name in table.column_names if name != "grams"}
        grams = np.frombuffer(b"".join(table["grams"].to_pylist()), np.uint8).reshape(-1, 2 * BUCKETS)
        counts = {source: Counts(**one) for source, one in facts["counts"].items()}
        known = np.frombuffer(bytes.fromhex(facts["known"]), np.uint64)
        return Profile(counts, facts["bound"], Sample(**columns, grams=grams), facts["known_bound"], known)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise PandaError(f"the profile of a corpus is damaged, or not of this version of the code: {error}") from error


def _bound(size: int, records: int) -> int:
    """Of uniform keys of so many records about ``size`` are below."""
    return min((1 << 64) - 1, (size << 64) // max(records, 1))


def _rows(ledger: Ledger) -> _Rows:
    """Usable records of a ledger, a batch at a time, and the counts of all of them."""
    sources: dict[str, int] = {}
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    keys, numbers, of_source = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int16)]
    first = 0
    for batch in ledger.table.select(["hash", "source", "verdict", "reason"]).to_batches():
        names, index = batch.column("source").dictionary.to_pylist(), batch.column("source").indices.to_numpy()
        rejected = pc.equal(batch.column("verdict").cast(pa.string()), "rejected").to_numpy(zero_copy_only=False)
        for number in np.unique(index).tolist():
            sources.setdefault(names[number], len(sources))
            mine = index == number
            out = np.flatnonzero(mine & rejected)
            tallies[names[number]].add(int(mine.sum()), first + out, batch.column("reason").take(pa.array(out)))
        usable = np.flatnonzero(~rejected)
        keys.append(_keys(batch.column("hash"))[usable])
        numbers.append(first + usable)
        of_source.append(np.array([sources.get(name, -1) for name in names], np.int16)[index[usable]])
        first += len(batch)
    key, row, source = np.concatenate(keys), np.concatenate(numbers), np.concatenate(of_source)
    repeated = _repeated(key)
    counts = {name: tallies[name].counts(row[repeated & (source == number)]) for name, number in sources.items()}
    return _Rows(key, row, source, counts)


@dataclass
class _Tally:
    """The counts of one source, while they are counted."""

    records: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    rows: dict[str, list[int]] = field(default_factory=dict)

    def add(self, records: int, rows: np.ndarray, reasons: pa.Array) -> None:
        self.records += records
        for row, reason in zip(rows.tolist(), reasons.cast(pa.string()).to_pylist(), strict=True):
            self.rejected[reason] += 1
            self.rows[reason] = [*self.rows.get(reason, []), row][-SHOWN:]

    def counts(self, repeated: np.ndarray) -> Counts:
        rows = {**self.rows, DUPLICATE: repeated[-SHOWN:].tolist()}
        return Counts(self.records, dict(sorted(self.rejected.items())), len(repeated), rows)


def _keys(hashes: pa.FixedSizeBinaryArray) -> np.ndarray:
    """The first 8 bytes of each, whatever they are where there is no hash: ``(n,) uint64``."""
    data = np.frombuffer(hashes.buffers()[1], np.uint64, 2 * len(hashes), 16 * hashes.offset)
    return data[::2]


def _repeated(keys: np.ndarray) -> np.ndarray:
    """Which have come before: ``(n,) bool``."""
    order = np.argsort(keys, kind="stable")
    repeated = np.zeros(len(keys), bool)
    repeated[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return repeated


def _described(ledger: Ledger, rows: _Rows, chosen: np.ndarray) -> Sample:
    """The chosen among usable records, each content once."""
    wanted = np.flatnonzero(chosen)
    _, first = np.unique(rows.key[wanted], return_index=True)
    wanted = wanted[first]
    prompts, answers, sizes, ends = _texts(ledger, rows.row[wanted])
    broken = [_is_broken(one) or _is_broken(other) for one, other in zip(prompts, answers, strict=True)]
    both = zip(prompts, answers, strict=True)
    return Sample(
        key=rows.key[wanted],
        row=rows.row[wanted],
        source=rows.source[wanted],
        prompt_bytes=sizes[:, 0],
        answer_bytes=sizes[:, 1],
        script=_scripts(answers),
        is_complete=np.array([end in _ENDINGS for end in ends], bool),
        is_broken=np.array(broken, bool),
        opening=_hashes([(prompt or answer)[:OPENING] for prompt, answer in both]),
        answer=_hashes(answers),
        grams=np.concatenate([_grams(prompts), _grams(answers)], axis=1),
    )


def _texts(ledger: Ledger, rows: np.ndarray) -> tuple[list[str], list[str], np.ndarray, list[str]]:
    """Heads of prompts and answers, the bytes of both ``(n, 2) int64``, the last character of each answer."""
    table = ledger.table.select(["shard", "example"])
    shard, example = (table[name].to_numpy()[rows] for name in ("shard", "example"))
    prompts, answers, ends = [""] * len(rows), [""] * len(rows), [""] * len(rows)
    sizes = np.zeros((len(rows), 2), np.int64)
    for number in np.unique(shard).tolist():
        mine, first = np.flatnonzero(shard == number), 0
        for batch in read_arrow(ledger.records_dir(number) / RECORDS_FILE).select(["roles", "texts"]).to_batches():
            here = mine[(example[mine] >= first) & (example[mine] < first + len(batch))]
            taken = batch.take(pa.array(example[here] - first))
            first += len(batch)
            texts, offsets = taken.column("texts"), taken.column("texts").offsets.to_numpy()
            values = texts.values
            heads = pc.utf8_slice_codeunits(values, 0, HEAD).to_pylist()
            lengths = pc.binary_length(values).to_numpy()
            lasts = pc.utf8_slice_codeunits(pc.utf8_rtrim_whitespace(values), -1).to_pylist()
            is_target = np.isin(taken.column("roles").values.to_numpy(), [int(role) for role in _TARGETS])
            for at, record in enumerate(here.tolist()):
                own = range(int(offsets[at]), int(offsets[at + 1]))
                said = [i for i in own if is_target[i]]
                prompts[record] = "\n".join(heads[i] for i in own if not is_target[i])[:HEAD]
                answers[record] = "\n".join(heads[i] for i in said)[:HEAD]
                ends[record] = lasts[said[-1]] if said else ""
                sizes[record] = (
                    sum(int(lengths[i]) for i in own if not is_target[i]),
                    sum(int(lengths[i]) for i in said),
                )
    return prompts, answers, sizes, ends


def _is_broken(text: str) -> bool:
    return not text.isascii() and bool(_BROKEN.search(text))


def _hashes(texts: list[str]) -> np.ndarray:
    return np.array([zlib.crc32(text.encode("utf-8", "replace")) for text in texts], np.uint32)


def _scripts(texts: list[str]) -> np.ndarray:
    """The script of most letters of each text: ``(n,) uint8``."""
    lengths = np.array([len(text) for text in texts], np.int64)
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "replace"), np.uint32)
    script = np.where(characters < 1 << 16, _SCRIPT_OF[characters & 0xFFFF], 0)
    owner = np.repeat(np.arange(len(texts)), lengths)
    counts = np.bincount(owner * len(SCRIPTS) + script, minlength=len(texts) * len(SCRIPTS)).reshape(-1, len(SCRIPTS))
    counts[:, 0] = 0
    return counts.argmax(axis=1).astype(np.uint8)


def _grams(texts: list[str]) -> np.ndarray:
    """How often runs of three bytes fall into each bucket: ``(n, BUCKETS) uint8``."""
    encoded = [text.lower().encode("utf-8", "replace") for text in texts]
    lengths = np.array([len(one) for one in encoded], np.int64)
    data = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint32)
    owner = np.repeat(np.arange(len(texts)), lengths)
    if len(data) < 3:  # no run
        return np.zeros((len(texts), BUCKETS), np.uint8)
    runs = data[:-2] | data[1:-1] << np.uint32(8) | data[2:] << np.uint32(16)
    runs = (runs * np.uint32(2654435761)) ^ (runs >> np.uint32(7))
    bucket = ((runs * np.uint32(2246822519)) >> np.uint32(32 - BUCKETS.bit_length() + 1)).astype(np.int64)
    whole = owner[:-2] == owner[2:]
    counts = np.bincount(owner[:-2][whole] * BUCKETS + bucket[whole], minlength=len(texts) * BUCKETS)
    return np.minimum(counts, 255).astype(np.uint8).reshape(-1, BUCKETS)
