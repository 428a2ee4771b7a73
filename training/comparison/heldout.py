"""The held-out records that models are compared on: chosen by content hash, read as text, for any tokenizer.

In: a plan directory. Out: `HeldOut`, the same records for every model whatever its tokenizer, with their slices (source
x language). The choice depends on content alone: of each source the records with the lowest hashes, so that a growing
corpus keeps most of them and every comparison can be repeated. Cost: one pass over the plan's ledger, then only the
chosen texts are read.
"""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.plan.ledger import hex_hashes, open_ledger
from data_prep.records.turns import Role

CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f]")
MAX_PROMPT_CHARS = 2000
MAX_ANSWER_CHARS = 120  # a good model's answer to such a prompt ends within `training.comparison.scores.MAX_NEW_TOKENS`
MIN_CJK_SHARE = 0.2  # of the characters that are not white space; Chinese text with code and names has 0.4 and more


@dataclass(frozen=True)
class HeldOut:
    """n records, in the order of their sources and hashes."""

    hashes: list[str]  # 32 hex digits each
    sources: list[str]
    languages: list[str]  # "cjk" or "other"
    places: list[str]  # file:line
    roles: pa.ListArray  # (n,) list<int8>
    texts: pa.ListArray  # (n,) list<large_string>
    num_excluded: int  # held out here, but somebody was trained on them

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def digest(self) -> str:
        """Names the set: the same records give the same digest."""
        return hashlib.sha256("".join(sorted(self.hashes)).encode()).hexdigest()[:32]

    def slices(self) -> dict[str, np.ndarray]:
        """Name of each slice -> its records, ``(m,) int64``; ``instruction/cjk``."""
        names = np.array(
            [f"{source}/{language}" for source, language in zip(self.sources, self.languages, strict=True)]
        )
        return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}

    def prompts(self, most: int) -> list[int]:
        """The first records with a short first answer; chosen by characters, so alike for every tokenizer."""
        found = []
        for record, (roles, texts) in enumerate(zip(self.roles.to_pylist(), self.texts.to_pylist(), strict=True)):
            answer = roles.index(Role.ASSISTANT) if Role.ASSISTANT in roles else 0
            if answer and len(texts[answer]) <= MAX_ANSWER_CHARS and len("".join(texts[:answer])) <= MAX_PROMPT_CHARS:
                found.append(record)
        return found[:most]


def choose(plan_dir: Path, max_per_source: int, excluded: Collection[str] = frozenset()) -> HeldOut:
    """The held-out records of a plan with the lowest hashes, without the excluded ones."""
    ledger = open_ledger(plan_dir)
    held_out = ledger.accepted("validation").select(["hash", "source", "file", "line", "shard", "example"])
    rows = held_out.append_column("hex", pa.array(hex_hashes(held_out["hash"]), pa.string())).to_pylist()
    fresh = [row for row in rows if row["hex"] not in excluded]
    chosen: dict[str, list[dict[str, Any]]] = {}
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


def trained_hashes(plan_dir: Path) -> set[str]:
    """Content hashes of all records a plan trains on."""
    return set(filter(None, hex_hashes(open_ledger(plan_dir).accepted("train")["hash"])))


def language_of(texts: list[str]) -> str:
    """`cjk` where Chinese, Japanese or Korean characters are a fifth of the text or more, else `other`."""
    text = "".join("".join(texts).split())
    return "cjk" if text and len(CJK.findall(text)) >= MIN_CJK_SHARE * len(text) else "other"
