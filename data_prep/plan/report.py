"""The data report: what became of all records, and what the rows are, in numbers that have to add up.

In: examples, verdicts and rows of a plan. Out: `DataReport`, which stands in the manifest of the plan, in the artifacts
of the run and in `panda prepare --json`; or the refusal of a plan that has lost something. Cost: sums over arrays.
"""

from collections import Counter
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from data_prep.errors import CorpusError, StoreError
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
    counts = {REASONS[i]: int(n) for i, n in enumerate(np.bincount(verdicts.reason[verdicts.reason >= 0])) if n}
    rejected = Counter(tokens.records.rejected) + Counter({r.value: n for r, n in counts.items() if r in REJECTED})
    accepted = verdicts.reason == ACCEPTED
    not_replayed = verdicts.reason == REASONS.index(Reason.NOT_REPLAYED)
    return {
        "records_in": tokens.records.records,
        "accepted": int(accepted.sum()),
        "rejected": dict(sorted(rejected.items())),
        "dropped": {reason.value: n for reason, n in sorted(counts.items()) if reason not in REJECTED},
        "unread_fields": tokens.records.unread_fields,
        "cut_tokens": int(verdicts.cut.sum()),
        "tokens": int(train.tokens.sum(dtype=np.int64)),
        "target_tokens": int(train.target_tokens.sum(dtype=np.int64)),
        "not_replayed_target_tokens": int(examples.targets[not_replayed].sum(dtype=np.int64)),
        "rows": train.num_rows,
        "utilisation": _utilisation(train, pack.max_seq_length),
        "max_seq_length": pack.max_seq_length,
        "validation_records": int((accepted & (verdicts.split == VALIDATION)).sum()),
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
    in_train = (verdicts.reason == ACCEPTED) & (verdicts.split == TRAIN)
    sampled_out = verdicts.reason == REASONS.index(Reason.NOT_SAMPLED)
    candidates = in_train | (sampled_out & (verdicts.split == TRAIN))
    tokens = np.bincount(train.source, weights=train.length, minlength=len(examples.sources))
    total = max(tokens.sum(), 1)
    shares: dict[str, SourceShare] = {}
    for number, source in enumerate(examples.sources):
        mine = examples.source == number
        copies = int(verdicts.copies[mine & in_train].sum())
        shares[source] = {
            "records": int((mine & in_train).sum()),
            "epochs": round(copies / max(int((mine & candidates).sum()), 1), 4),
            "tokens": int(tokens[number]),
            "share": round(float(tokens[number] / total), 6),
        }
    return shares


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
    kept = verdicts.copies.astype(np.int64) * (examples.lengths - verdicts.cut)
    for number, split in enumerate(SPLITS):
        expected = int(kept[verdicts.split == number].sum())
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
