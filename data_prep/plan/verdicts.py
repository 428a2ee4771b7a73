"""What becomes of each example: dropped with a reason, held out, or trained on, how often and in which pieces.

In: `Examples`, the settings, for replay the earlier plan. Out: `Verdicts`, arrays over the examples, and the `Pieces`
that must go into rows. In this order: no target -> taken down -> quarantined -> duplicate -> split -> replay ->
overflow -> mixture. Every decision is a function of the content hash, so a record keeps its split when the corpus
grows, equal records are never on both sides, and a raised weight only adds.

Replay: going on from an earlier model, only a share of the records that it was trained on is trained on again; a larger
share only adds. Records a plan left out for this reason count as trained on by the plans after it.

Cost: 1 us an example (sorting hashes); near duplicates 0.2 ms; replay reads three columns of the earlier ledger, a
second per million records.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from data_prep.errors import CorpusError
from data_prep.plan import tombstones
from data_prep.plan.duplicates import exact_duplicates, is_among
from data_prep.plan.examples import Examples
from data_prep.plan.ledger import LEDGER_FILE
from data_prep.plan.order import index_type, uniform
from data_prep.plan.pack import split_evenly
from data_prep.records.reasons import Reason
from data_prep.records.shard import read_arrow
from data_prep.settings import CorpusSettings, PackSettings

REASONS = list(Reason)
ACCEPTED = -1
TRAIN, VALIDATION = 0, 1
SPLITS = ("train", "validation")
MAX_NAMED = 10  # records in an error message
_SPLIT_KEY = 0x5EED  # not the seed: a record never changes sides
_REPLAY_KEY = 0x01D  # not the seed: which old records are left out depends on them alone


@dataclass(frozen=True)
class Verdicts:
    """One entry per example."""

    reason: np.ndarray  # (n,) int8, ACCEPTED or the index of a `Reason`
    split: np.ndarray  # (n,) int8, TRAIN or VALIDATION
    copies: np.ndarray  # (n,) int32, times in the rows of its split; 0 unless accepted
    cut: np.ndarray  # (n,) int32, tokens of an accepted example that are in no row


@dataclass(frozen=True)
class Pieces:
    """Parts of examples that go into rows, one entry per part; copies are not yet repeated."""

    example: np.ndarray  # (m,) int32 or, of more examples than that can count, int64
    start: np.ndarray  # (m,) int32
    length: np.ndarray  # (m,) int32
    cuttable: np.ndarray  # (m,) bool, may be cut further to fill a row


def judge(
    examples: Examples, corpus: CorpusSettings, pack: PackSettings, near_duplicates: Callable[[], np.ndarray]
) -> tuple[Verdicts, Pieces]:
    """Verdicts and pieces of all examples.

    :param near_duplicates: called only where the settings ask for it: ``(n,) bool``.
    :raises CorpusError: a mixture weight of an unknown source, or ``overflow=error`` and a record is too long.
    """
    reason = np.full(len(examples), ACCEPTED, dtype=np.int8)
    if examples.refused is not None:
        reason[examples.refused] = REASONS.index(Reason.TEMPLATE_REFUSED)
    _mark(reason, examples.targets == 0, Reason.NO_TARGET_TOKENS)
    _mark(reason, tombstones.matching(examples.hashes, taken_down(corpus)), Reason.TAKEN_DOWN)
    _mark(reason, tombstones.matching(examples.hashes, quarantined(corpus)), Reason.QUARANTINED)
    if corpus.deduplicate != "none":
        _mark(reason, exact_duplicates(examples.hashes), Reason.DUPLICATE)
    if corpus.deduplicate == "near":
        _mark(reason, near_duplicates(), Reason.NEAR_DUPLICATE)
    split = (uniform(examples.keys, _SPLIT_KEY) < corpus.validation_fraction).astype(np.int8)
    _mark(reason, (split == TRAIN) & left_out(examples.hashes, examples.keys, corpus), Reason.NOT_REPLAYED)
    pieces, too_long, cut = _pieces(examples, reason == ACCEPTED, pack)
    _mark(reason, too_long, Reason.TOO_LONG)
    tokens = np.where((reason == ACCEPTED) & (split == TRAIN), examples.lengths - cut, 0)
    by_source = np.bincount(examples.source, weights=tokens, minlength=len(examples.sources))
    copies = _copies(examples, split, weights_of(examples.sources, by_source, pack), pack.seed)
    _mark(reason, copies == 0, Reason.NOT_SAMPLED)
    accepted = reason == ACCEPTED
    return Verdicts(reason, split, np.where(accepted, copies, 0).astype(np.int32), np.where(accepted, cut, 0)), pieces


def taken_down(corpus: CorpusSettings) -> list[str]:
    """Content hashes that have a tombstone."""
    return tombstones.read(Path(corpus.tombstones)) if corpus.tombstones else []


def quarantined(corpus: CorpusSettings) -> list[str]:
    """Content hashes that training has named because of a spike."""
    return tombstones.read(Path(corpus.quarantine)) if corpus.quarantine else []


def left_out(hashes: np.ndarray, keys: np.ndarray, corpus: CorpusSettings) -> np.ndarray:
    """``(n, 16) uint8`` hashes and their ``(n,)`` keys -> ``(n,) bool``."""
    if corpus.replay_of is None or corpus.replay_share == 1:
        return np.zeros(len(hashes), dtype=bool)
    known = is_among(hashes, trained_on(Path(corpus.replay_of)))
    return known & (uniform(keys, _REPLAY_KEY) >= corpus.replay_share)


def trained_on(plan_dir: Path) -> np.ndarray:
    """Content hashes ``(m, 16) uint8`` of the training records of a plan, and of what it counted as trained on before.

    :raises CorpusError: there is no such plan.
    """
    try:
        ledger = read_arrow(plan_dir / LEDGER_FILE).select(["hash", "split", "reason"])  # of any format version
    except FileNotFoundError:
        raise CorpusError(f"replay_of={str(plan_dir)!r}: no plan there (no {LEDGER_FILE})") from None
    trained = pc.or_kleene(pc.equal(ledger["split"], "train"), pc.equal(ledger["reason"], Reason.NOT_REPLAYED.value))
    column = ledger["hash"].filter(trained)
    return np.frombuffer(b"".join(column.to_pylist()), dtype=np.uint8).reshape(-1, 16)


def weights_of(sources: list[str], tokens: np.ndarray, pack: PackSettings) -> np.ndarray:
    """Epochs over each source. The entry of `mixture` that counts is its own, else that of the source it is below.

    With ``mixture_by=share`` an entry is a share of all tokens: those that make the scarcest of them last one epoch.

    :param tokens: ``(num_sources,)`` training tokens of each.
    :raises CorpusError: a name that is no source; by share, a source without entry.
    """
    mixture = pack.mixture or {}
    known = {*sources, *(source.partition("/")[0] for source in sources)}
    wrong = sorted(set(mixture) - known)
    if wrong:
        raise CorpusError(
            f"mixture: {', '.join(f'{name}: {mixture[name]}' for name in wrong)}: not a source of this corpus. "
            f"Sources: {', '.join(sorted(known))}"
        )
    entry = [source if source in mixture else source.partition("/")[0] for source in sources]
    if pack.mixture_by == "epochs":
        return np.array([mixture.get(name, 1.0) for name in entry])
    return _epochs_of_shares(sources, entry, tokens, mixture)


def _epochs_of_shares(
    sources: list[str], entry: list[str], tokens: np.ndarray, mixture: dict[str, float]
) -> np.ndarray:
    missing = [source for source, name in zip(sources, entry, strict=True) if name not in mixture]
    if missing:
        raise CorpusError(f"mixture_by=share: mixture says nothing of {', '.join(missing)}; 0 leaves a source out")
    available = {name: sum(n for n, of in zip(tokens.tolist(), entry, strict=True) if of == name) for name in mixture}
    lasting = [available[name] / share for name, share in mixture.items() if share]
    total = min(lasting, default=0)
    return np.array([total * mixture[name] / max(available[name], 1) for name in entry])


def _mark(reason: np.ndarray, where: np.ndarray, value: Reason) -> None:
    """The first reason counts."""
    reason[where & (reason == ACCEPTED)] = REASONS.index(value)


def _copies(examples: Examples, split: np.ndarray, source_weights: np.ndarray, seed: int) -> np.ndarray:
    """Times each example is trained on in an epoch: whole epochs, and one more for a fraction chosen by hash."""
    weights = source_weights[examples.source]
    whole = np.floor(weights)
    copies = whole + (uniform(examples.keys, seed) < weights - whole)
    return np.where(split == VALIDATION, np.minimum(np.ceil(weights), 1), copies).astype(np.int32)


def _pieces(examples: Examples, wanted: np.ndarray, pack: PackSettings) -> tuple[Pieces, np.ndarray, np.ndarray]:
    """Pieces of the wanted examples, which of them are too long after all, and the tokens cut from each."""
    too_long = np.zeros(len(examples), dtype=bool)
    cut = np.zeros(len(examples), dtype=np.int32)
    document = examples.pretraining & (np.diff(examples.run_offsets) == 2) & (examples.prompt <= 1)
    cuttable = document & pack.packing
    longer = wanted & (examples.lengths > pack.max_seq_length) & ~cuttable
    whole = np.flatnonzero(wanted & ~longer)
    example, start, length = [whole], [np.zeros(len(whole), np.int32)], [examples.lengths[whole]]
    policies = {"drop": _drop, "truncate_prompt_left": _keep_end, "truncate_target": _keep_start, "split": _split}
    for index in np.flatnonzero(longer).tolist():
        if pack.overflow == "error" and not examples.pretraining[index]:
            raise _too_long_error(examples, np.flatnonzero(longer & ~examples.pretraining), pack)
        policy = _split if examples.pretraining[index] else policies[pack.overflow]
        parts = _with_targets(examples, index, policy(examples, index, pack.max_seq_length))
        too_long[index] = not parts
        cut[index] = examples.lengths[index] - sum(part[1] for part in parts)
        example.append(np.full(len(parts), index))
        start.append(np.array([part[0] for part in parts], dtype=np.int32))
        length.append(np.array([part[1] for part in parts], dtype=np.int32))
    flat: np.ndarray = np.concatenate(example, dtype=index_type(len(examples)), casting="same_kind")
    return Pieces(flat, np.concatenate(start), np.concatenate(length), cuttable[flat]), too_long, cut


Part = tuple[int, int]  # start, length


def _drop(examples: Examples, index: int, capacity: int) -> list[Part]:
    return []


def _keep_end(examples: Examples, index: int, capacity: int) -> list[Part]:
    """The end of the prompt and all targets; nothing if no token of the prompt would be left before them."""
    start = int(examples.lengths[index]) - capacity
    return [(start, capacity)] if start < examples.prompt[index] else []


def _keep_start(examples: Examples, index: int, capacity: int) -> list[Part]:
    return [(0, capacity)]


def _split(examples: Examples, index: int, capacity: int) -> list[Part]:
    return split_evenly(int(examples.lengths[index]), capacity)


def _with_targets(examples: Examples, index: int, parts: list[Part]) -> list[Part]:
    if not parts:
        return []
    start, length = np.array(parts).T
    targets = examples.targets_of(np.full(len(parts), index), start, length)
    return [part for part, count in zip(parts, targets, strict=True) if count]


def _too_long_error(examples: Examples, longer: np.ndarray, pack: PackSettings) -> CorpusError:
    first = [f"  {examples.place(index)}: {examples.lengths[index]} tokens" for index in longer[:MAX_NAMED].tolist()]
    more = [f"  and {len(longer) - MAX_NAMED} more"] if len(longer) > MAX_NAMED else []
    limit, longest = pack.max_seq_length, examples.lengths[longer].max()
    return CorpusError(
        "\n".join([f"overflow=error: {len(longer)} records are longer than max_seq_length={limit}:", *first, *more])
        + f"\nRaise max_seq_length to {longest}, or choose another overflow: drop, truncate_prompt_left, "
        "truncate_target, split"
    )
