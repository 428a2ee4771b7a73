"""The data report: what became of all records, and what the rows are, in numbers that have to add up.

In: examples, verdicts and rows of a plan. Out: `DataReport`, which stands in the manifest of the plan, in the artifacts
of the run and in `panda prepare --json`; or the refusal of a plan that has lost something. Cost: sums over arrays.
"""

from collections import Counter
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from data_prep.errors import CorpusError, StoreError
from data_prep.plan.columns import Block, sums_by, total
from data_prep.plan.examples import Examples
from data_prep.plan.plan_file import Rows
from data_prep.plan.verdicts import ACCEPTED, REASONS, SPLITS, TRAIN, VALIDATION, Verdicts
from data_prep.records.reasons import REJECTED, Reason
from data_prep.settings import PackSettings
from data_prep.tokens.tokenize import TokensResult


class SourceShare(TypedDict):
    """A source in the training rows."""

    records: int
    epochs: float  # the mean times a record is in the rows
    tokens: int
    share: float  # of all tokens


class DataReport(TypedDict):
    """In the order of a person's questions; plans of earlier versions lack the later fields."""

    records_in: int
    accepted: int
    rejected: dict[str, int]  # by `Reason`
    dropped: dict[str, int]
    unread_fields: NotRequired[dict[str, int]]  # records that have a key nobody reads
    cut_tokens: int
    tokens: int  # of the training rows, like the next four
    target_tokens: int
    not_replayed_target_tokens: NotRequired[int]
    rows: int
    utilisation: float  # share of rows x max_seq_length
    max_seq_length: int
    validation_records: int
    validation_tokens: int
    validation_target_tokens: int
    validation_rows: int
    sources: dict[str, SourceShare]
    proof: dict[str, int]  # targets read back: all, ending in the stop token, decoded equal, ...
    seconds: NotRequired[dict[str, float]]  # by stage; this and the rest is of the moment, not of the plan
    reused: NotRequired[dict[str, bool]]
    engines: NotRequired[dict[str, int]]  # units whose ids each gave
    peak_rss_bytes: NotRequired[int]
    plan_dir: NotRequired[str]


def make_report(
    tokens: TokensResult, examples: Examples, verdicts: Verdicts, rows: dict[str, Rows], pack: PackSettings
) -> DataReport:
    """The numbers of the plan; what depends on the machine and the moment is added by `plan_rows`."""
    train, validation = rows[SPLITS[TRAIN]], rows[SPLITS[VALIDATION]]
    by_reason = sums_by(verdicts.reason, len(REASONS) + 1, lambda block: 1)  # the last one, -1: accepted
    counts = {REASONS[i]: int(n) for i, n in enumerate(by_reason[:ACCEPTED]) if n}
    rejected = Counter(tokens.records.rejected) + Counter({r.value: n for r, n in counts.items() if r in REJECTED})
    not_replayed = REASONS.index(Reason.NOT_REPLAYED)

    def held_out(block: Block) -> np.ndarray:
        return (verdicts.reason[block] == ACCEPTED) & (verdicts.split[block] == VALIDATION)

    def left_out_targets(block: Block) -> np.ndarray:
        return np.where(verdicts.reason[block] == not_replayed, examples.targets[block], 0)

    return {
        "records_in": tokens.records.records,
        "accepted": int(by_reason[ACCEPTED]),
        "rejected": dict(sorted(rejected.items())),
        "dropped": {reason.value: n for reason, n in sorted(counts.items()) if reason not in REJECTED},
        "unread_fields": tokens.records.unread_fields,
        "cut_tokens": total(len(examples), verdicts.cut.__getitem__),
        "tokens": int(train.tokens.sum(dtype=np.int64)),
        "target_tokens": int(train.target_tokens.sum(dtype=np.int64)),
        "not_replayed_target_tokens": total(len(examples), left_out_targets),
        "rows": train.num_rows,
        "utilisation": _utilisation(train, pack.max_seq_length),
        "max_seq_length": pack.max_seq_length,
        "validation_records": total(len(examples), held_out),
        "validation_tokens": int(validation.tokens.sum(dtype=np.int64)),
        "validation_target_tokens": int(validation.target_tokens.sum(dtype=np.int64)),
        "validation_rows": validation.num_rows,
        "sources": _shares(examples, verdicts, train),
        "proof": _proof(tokens),
    }


def _utilisation(rows: Rows, max_seq_length: int) -> float:
    space = rows.num_rows * max_seq_length
    return round(float(rows.tokens.sum(dtype=np.int64)) / space, 6) if space else 0.0


def _shares(examples: Examples, verdicts: Verdicts, train: Rows) -> dict[str, SourceShare]:
    """Per source: records and tokens in the training rows, its share of all, and the effective epochs over it."""
    sampled_out, num_sources = REASONS.index(Reason.NOT_SAMPLED), len(examples.sources)

    def in_train(block: Block) -> np.ndarray:
        return (verdicts.reason[block] == ACCEPTED) & (verdicts.split[block] == TRAIN)

    def candidates(block: Block) -> np.ndarray:
        left_out = (verdicts.reason[block] == sampled_out) & (verdicts.split[block] == TRAIN)
        return in_train(block) | left_out

    records = sums_by(examples.source, num_sources, in_train)
    copies = sums_by(examples.source, num_sources, lambda block: np.where(in_train(block), verdicts.copies[block], 0))
    offered = sums_by(examples.source, num_sources, candidates)
    tokens = sums_by(train.source, num_sources, train.length.__getitem__)
    return {
        source: {
            "records": int(records[number]),
            "epochs": round(int(copies[number]) / max(int(offered[number]), 1), 4),
            "tokens": int(tokens[number]),
            "share": round(float(tokens[number] / max(tokens.sum(), 1)), 6),
        }
        for number, source in enumerate(examples.sources)
    }


def _proof(tokens: TokensResult) -> dict[str, int]:
    names = ("targets", "targets_ending_in_stop", "targets_decoded_equal", "examples_without_target")
    return {name: sum(unit.proof[name] for unit in tokens.units) for name in names}


def check_conservation(report: DataReport, examples: Examples, verdicts: Verdicts, rows: dict[str, Rows]) -> None:
    """Every record has one verdict, every token of an accepted example is in the plan or counted as cut.

    :raises StoreError: otherwise; nothing is written then.
    """
    judged = report["accepted"] + sum(report["rejected"].values()) + sum(report["dropped"].values())
    if judged != report["records_in"]:
        raise StoreError(f"{report['records_in']} records in, but {judged} accepted, rejected or dropped")
    kept = sums_by(verdicts.split, len(SPLITS), lambda block: _kept(examples, verdicts, block))
    for number, split in enumerate(SPLITS):
        expected = int(kept[number])
        planned = int(rows[split].length.sum(dtype=np.int64))
        if expected != planned:
            raise StoreError(f"{split}: accepted examples have {expected} tokens, the plan has {planned}")
        if rows[split].num_rows and rows[split].target_tokens.min() < 1:
            raise StoreError(f"{split}: row {int(rows[split].target_tokens.argmin())} has no target token")
    if report["rows"] == 0:
        ways = ["hold out less (validation_fraction)"] if report["validation_records"] else []
        ways += (
            ["let in longer records (max_seq_length, overflow)"] if Reason.TOO_LONG.value in report["dropped"] else []
        )
        raise CorpusError(
            f"nothing to train on: of {report['records_in']} records none is in the training rows "
            f"(rejected {report['rejected']}, dropped {report['dropped']}, held out {report['validation_records']})"
            + "".join(f"; {way}" for way in ways)
        )


def _kept(examples: Examples, verdicts: Verdicts, block: Block) -> np.ndarray:
    """Tokens of each example in the rows."""
    return verdicts.copies[block].astype(np.int64) * (examples.lengths[block] - verdicts.cut[block])
