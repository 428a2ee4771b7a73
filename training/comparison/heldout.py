"""The held-out records that models are compared on: chosen by content hash, read as text, for any tokenizer.

In: a plan directory, that of the champion, a file of neutral texts. Out: `HeldOut`, the same records for every model
whatever its tokenizer, with their slices (source x language): first those of this corpus, which decide about the gain,
then those by which forgetting is seen. The choice depends on content alone: of each source the records with the lowest
hashes, so that a growing corpus keeps most of them and every comparison can be repeated. Cost: one pass over the
ledgers of the plans, then only the chosen texts are read.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.errors import PandaError
from data_prep.plan.ledger import hex_hashes, open_ledger
from data_prep.records.normalise import Decoder, Normal, content_hash, normalise
from data_prep.records.turns import Rejected, Role
from training.comparison.statistics import BEFORE, NEUTRAL, Elsewhere

CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f]")
BUNDLED = Path(__file__).with_name("neutral.jsonl")  # written for this purpose; part of this project
MAX_PROMPT_CHARS = 2000
MAX_ANSWER_CHARS = 120  # a good model's answer to such a prompt ends within `training.comparison.scores.MAX_NEW_TOKENS`
MIN_CJK_SHARE = 0.2  # of the characters that are not white space; Chinese text with code and names has 0.4 and more


@dataclass(frozen=True)
class HeldOut:
    """n records, in the order of their sources and hashes; those from elsewhere (`num_own`) are the last."""

    hashes: list[str]  # 32 hex digits each
    sources: list[str]
    languages: list[str]  # "cjk" or "other"
    places: list[str]  # file:line
    roles: pa.ListArray  # (n,) list<int8>
    texts: pa.ListArray  # (n,) list<large_string>
    num_excluded: int  # held out here, but somebody was trained on them
    num_elsewhere: int = 0

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def num_own(self) -> int:
        """Records of this corpus."""
        return len(self) - self.num_elsewhere

    @property
    def digest(self) -> str:
        """Names the set: the same records give the same digest."""
        return hashlib.sha256("".join(sorted(self.hashes)).encode()).hexdigest()[:32]

    @property
    def names(self) -> np.ndarray:
        """Name of the slice of each record, ``(n,) str``; ``instruction/cjk``."""
        return np.array([f"{source}/{language}" for source, language in zip(self.sources, self.languages, strict=True)])

    def slices(self) -> dict[str, np.ndarray]:
        """Name of each slice of this corpus -> its records, ``(m,) int64``."""
        return _by_name(self.names[: self.num_own], 0)

    def elsewhere(self) -> Elsewhere:
        """The other slices, and how well their texts can be guessed without knowing anything."""
        slices = _by_name(self.names[self.num_own :], self.num_own)
        guesses = np.zeros(len(self))
        texts = ["".join(one) for one in self.texts.to_pylist()]
        for records in (records for name, records in slices.items() if name.startswith(NEUTRAL)):
            guesses[records] = guessed([texts[record] for record in records])
        return Elsewhere(slices, guesses)

    def with_others(self, others: "HeldOut") -> "HeldOut":
        """These records, and others from elsewhere behind them; what is here already is left out there."""
        known = set(self.hashes)
        new = [number for number, content in enumerate(others.hashes) if content not in known]
        return HeldOut(
            hashes=[*self.hashes, *(others.hashes[i] for i in new)],
            sources=[*self.sources, *(others.sources[i] for i in new)],
            languages=[*self.languages, *(others.languages[i] for i in new)],
            places=[*self.places, *(others.places[i] for i in new)],
            roles=pa.concat_arrays([self.roles, others.roles.take(pa.array(new, pa.int64()))]),
            texts=pa.concat_arrays([self.texts, others.texts.take(pa.array(new, pa.int64()))]),
            num_excluded=self.num_excluded,
            num_elsewhere=self.num_elsewhere + len(new),
        )

    def prompts(self, most: int) -> list[int]:
        """The first records with a short first answer; chosen by characters, so alike for every tokenizer."""
        found = []
        own = zip(self.roles[: self.num_own].to_pylist(), self.texts[: self.num_own].to_pylist(), strict=True)
        for record, (roles, texts) in enumerate(own):
            answer = roles.index(Role.ASSISTANT) if Role.ASSISTANT in roles else 0
            if answer and len(texts[answer]) <= MAX_ANSWER_CHARS and len("".join(texts[:answer])) <= MAX_PROMPT_CHARS:
                found.append(record)
        return found[:most]

    def without(self, records: Collection[int]) -> "HeldOut":
        """All but some of the records."""
        kept = [record for record in range(len(self)) if record not in records]
        return HeldOut(
            hashes=[self.hashes[i] for i in kept],
            sources=[self.sources[i] for i in kept],
            languages=[self.languages[i] for i in kept],
            places=[self.places[i] for i in kept],
            roles=self.roles.take(pa.array(kept, pa.int64())),
            texts=self.texts.take(pa.array(kept, pa.int64())),
            num_excluded=self.num_excluded,
            num_elsewhere=sum(record >= self.num_own for record in kept),
        )

    def texts_of_prompts(self, most: int) -> list[tuple[str, str]]:
        """(prompt, right answer) of each of these, as text."""
        records = self.prompts(most)
        first = [self.roles[record].as_py().index(Role.ASSISTANT) for record in records]
        texts = [self.texts[record].as_py() for record in records]
        return [("\n".join(one[:answer]), one[answer]) for one, answer in zip(texts, first, strict=True)]


def choose(plan_dir: Path, max_per_source: int, excluded: Collection[str] = frozenset()) -> HeldOut:
    """The held-out records of a plan with the lowest hashes, without the excluded ones."""
    ledger = open_ledger(plan_dir)
    held_out = ledger.accepted("validation").select(["hash", "source", "file", "line", "shard", "example"])
    rows = held_out.append_column("hex", pa.array(hex_hashes(held_out["hash"]), pa.string())).to_pylist()
    fresh = [row for row in rows if row["hex"] not in excluded]
    chosen: dict[str, list[Any]] = {}  # rows of the ledger
    for row in sorted(fresh, key=lambda row: (row["source"], row["hex"])):
        of_source = chosen.setdefault(row["source"], [])
        if len(of_source) < max_per_source:
            of_source.append(row)
    flat = [row for of_source in chosen.values() for row in of_source]
    roles, texts = ledger.read_texts(flat)
    return HeldOut(
        hashes=[row["hex"] for row in flat],
        sources=[row["source"] for row in flat],
        languages=[language_of(text) for text in texts.to_pylist()],
        places=[f"{row['file']}:{row['line']}" for row in flat],
        roles=roles,
        texts=texts,
        num_excluded=len(rows) - len(fresh),
    )


def _by_name(names: np.ndarray, first: int) -> dict[str, np.ndarray]:
    return {str(name): first + np.flatnonzero(names == name) for name in np.unique(names)}


def before(champion_plan: Path, max_per_source: int, excluded: Collection[str]) -> HeldOut:
    """What was held out for the champion, without the excluded records; its sources are called ``before/...``."""
    chosen = choose(champion_plan, max_per_source, excluded)
    return replace(chosen, sources=[f"{BEFORE}/{source}" for source in chosen.sources])


def neutral(path: Path | None) -> HeldOut:
    """The texts of a file of JSON lines in any shape of a record; None = the bundled ones.

    :raises PandaError: it cannot be read, or has a line that is no record.
    """
    path = path or BUNDLED
    try:
        lines = [line for line in enumerate(path.read_bytes().splitlines(), start=1) if line[1].strip()]
    except OSError as error:
        raise PandaError(f"neutral_texts: {path}: {error.strerror}") from error
    records = [_record(path, *line) for line in lines]
    texts = [texts for _, texts in records]
    return HeldOut(
        hashes=[content_hash(*record).hex() for record in records],
        sources=[NEUTRAL] * len(records),
        languages=[language_of(one) for one in texts],
        places=[f"{path}:{number}" for number, _ in lines],
        roles=pa.array([list(roles) for roles, _ in records], pa.list_(pa.int8())),
        texts=pa.array(texts, pa.list_(pa.large_string())),
        num_excluded=0,
    )


def _record(path: Path, number: int, line: bytes) -> Normal:
    try:
        return normalise(Decoder().decode(line), "instruction", [])
    except Rejected as error:
        raise PandaError(
            f'neutral_texts: {path}:{number}: {error}; a line is a record such as {{"text": ...}}'
        ) from None


def guessed(texts: list[str]) -> np.ndarray:
    """Nats that each text costs a reader who only knows how often its characters are in all of them, ``(n,) float``."""
    counts = Counter("".join(texts))
    total = sum(counts.values())
    cost = {character: -math.log(count / total) for character, count in counts.items()}
    return np.array([sum(cost[character] for character in text) for text in texts])


def trained_hashes(plan_dir: Path) -> set[str]:
    """Content hashes of all records a plan trains on."""
    return set(filter(None, hex_hashes(open_ledger(plan_dir).accepted("train")["hash"])))


def language_of(texts: list[str]) -> str:
    """`cjk` where Chinese, Japanese or Korean characters are a fifth of the text or more, else `other`."""
    text = "".join("".join(texts).split())
    return "cjk" if text and len(CJK.findall(text)) >= MIN_CJK_SHARE * len(text) else "other"
