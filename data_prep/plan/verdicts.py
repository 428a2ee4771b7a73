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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.errors import CorpusError
from data_prep.plan import tombstones
from data_prep.plan.columns import Block, blocks, index_type, joined, made, sums_by, taken, where, zeros
from data_prep.plan.duplicates import Known, exact_duplicates
from data_prep.plan.examples import Examples
from data_prep.plan.ledger import LEDGER_FILE
from data_prep.plan.order import uniform
from data_prep.plan.pack import split_evenly
from data_prep.records.reasons import Reason
from data_prep.records.shard import read_arrow
from data_prep.settings import CorpusSettings, PackSettings

Mask = Callable[[Block], np.ndarray]
"""What holds for the examples of a block: ``(m,) bool``."""

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
    count, keys = len(examples), examples.keys
    reason = made(count, np.int8, lambda _: ACCEPTED)
    for block in blocks(len(examples.refused)):
        reason[examples.refused[block]] = REASONS.index(Reason.TEMPLATE_REFUSED)
    _mark(reason, Reason.NO_TARGET_TOKENS, lambda block: examples.targets[block] == 0)
    for hashes, why in ((taken_down(corpus), Reason.TAKEN_DOWN), (quarantined(corpus), Reason.QUARANTINED)):
        if hashes:
            _mark(reason, why, _among(examples, tombstones.known(hashes)))
    if corpus.deduplicate != "none":
        _mark(reason, Reason.DUPLICATE, exact_duplicates(examples.hashes).__getitem__)
    if corpus.deduplicate == "near":
        _mark(reason, Reason.NEAR_DUPLICATE, near_duplicates().__getitem__)
    split = made(count, np.int8, lambda block: uniform(keys[block], _SPLIT_KEY) < corpus.validation_fraction)
    if corpus.replay_of is not None and corpus.replay_share < 1:
        left_out = _left_out(examples, Path(corpus.replay_of), corpus.replay_share)
        _mark(reason, Reason.NOT_REPLAYED, lambda block: (split[block] == TRAIN) & left_out(block))
    pieces, too_long, cut = _pieces(examples, reason, pack)
    _mark(reason, Reason.TOO_LONG, too_long.__getitem__)
    copies = _copies(examples, split, weights_of(examples.sources, _tokens(examples, reason, split, cut), pack), pack)
    _mark(reason, Reason.NOT_SAMPLED, lambda block: copies[block] == 0)
    for block in blocks(count):
        copies[block][reason[block] != ACCEPTED] = 0
        cut[block][reason[block] != ACCEPTED] = 0
    return Verdicts(reason, split, copies, cut), pieces


def taken_down(corpus: CorpusSettings) -> list[str]:
    """Content hashes that have a tombstone."""
    return tombstones.read(Path(corpus.tombstones)) if corpus.tombstones else []


def quarantined(corpus: CorpusSettings) -> list[str]:
    """Content hashes that training has named because of a spike."""
    return tombstones.read(Path(corpus.quarantine)) if corpus.quarantine else []


def _among(examples: Examples, known: Known) -> Mask:
    return lambda block: known.holds(examples.hashes[block])


def _left_out(examples: Examples, replay_of: Path, replay_share: float) -> Mask:
    """What an earlier plan has trained on, but for the share that is replayed."""
    known = Known(trained_on(replay_of))
    old, keys = _among(examples, known), examples.keys
    return lambda block: old(block) & (uniform(keys[block], _REPLAY_KEY) >= replay_share)


def trained_on(plan_dir: Path) -> np.ndarray:
    """Content hashes ``(m, 16) uint8`` of the training records of a plan, and of what it counted as trained on before.

    :raises CorpusError: there is no such plan.
    """
    try:
        ledger = read_arrow(plan_dir / LEDGER_FILE).select(["hash", "split", "reason"])  # of any format version
    except FileNotFoundError:
        raise CorpusError(f"replay_of={str(plan_dir)!r}: no plan there (no {LEDGER_FILE})") from None
    return joined((_trained_in(batch) for batch in ledger.to_batches()), np.uint8).reshape(-1, 16)


def _trained_in(ledger: pa.RecordBatch) -> np.ndarray:
    """Bytes of the hashes in one batch of a ledger: ``(16 m,) uint8``."""
    trained = pc.or_kleene(pc.equal(ledger["split"], "train"), pc.equal(ledger["reason"], Reason.NOT_REPLAYED.value))
    hashes = ledger["hash"].filter(trained)  # a copy, without an offset
    return np.frombuffer(hashes.buffers()[1], np.uint8)[: 16 * len(hashes)] if len(hashes) else np.zeros(0, np.uint8)


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


def _mark(reason: np.ndarray, value: Reason, where: Mask) -> None:
    """The first reason counts."""
    for block in blocks(len(reason)):
        reason[block][where(block) & (reason[block] == ACCEPTED)] = REASONS.index(value)


def _tokens(examples: Examples, reason: np.ndarray, split: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Training tokens of each source: ``(num_sources,) int64``."""

    def of_training(block: Block) -> np.ndarray:
        trained = (reason[block] == ACCEPTED) & (split[block] == TRAIN)
        return np.where(trained, examples.lengths[block] - cut[block], 0)

    return sums_by(examples.source, len(examples.sources), of_training)


def _copies(examples: Examples, split: np.ndarray, source_weights: np.ndarray, pack: PackSettings) -> np.ndarray:
    """Times each example is trained on in an epoch: whole epochs, and one more for a fraction chosen by hash."""

    def of(block: Block) -> np.ndarray:
        weights = source_weights[examples.source[block]]
        whole = np.floor(weights)
        copies = whole + (uniform(examples.keys[block], pack.seed) < weights - whole)
        return np.where(split[block] == VALIDATION, np.minimum(np.ceil(weights), 1), copies)

    return made(len(examples), np.int32, of)


def _pieces(examples: Examples, reason: np.ndarray, pack: PackSettings) -> tuple[Pieces, np.ndarray, np.ndarray]:
    """Pieces of the accepted examples, which of them are too long after all, and the tokens cut from each."""
    count = len(examples)

    def document(block: Block) -> np.ndarray:
        num_runs = np.diff(examples.run_offsets[block.start : block.stop + 1])
        return examples.pretraining[block] & (num_runs == 2) & (examples.prompt[block] <= 1)

    cuttable = made(count, np.bool_, lambda block: document(block) & pack.packing)

    def longer(block: Block) -> np.ndarray:
        too_many = examples.lengths[block] > pack.max_seq_length
        return (reason[block] == ACCEPTED) & too_many & ~cuttable[block]

    whole = where(count, lambda block: (reason[block] == ACCEPTED) & ~longer(block))
    rest = where(count, longer)
    if pack.overflow == "error":
        refused = where(count, lambda block: longer(block) & ~examples.pretraining[block])
        if len(refused):
            raise _too_long_error(examples, refused, pack)
    too_long, cut = zeros(count, np.bool_), zeros(count, np.int32)

    def parts() -> Iterator[np.ndarray]:
        for block in blocks(len(rest)):
            found = [part for index in rest[block].tolist() for part in _parts(examples, index, too_long, cut, pack)]
            yield np.array(found, np.int64).reshape(-1, 3).ravel()

    others = joined(parts(), np.int64).reshape(-1, 3)
    number = len(whole) + len(others)
    example, start, length = zeros(number, index_type(count)), zeros(number, np.int32), zeros(number, np.int32)
    for block in blocks(len(whole)):
        example[block], length[block] = whole[block], examples.lengths[whole[block]]
    for block in blocks(len(others)):
        there = slice(len(whole) + block.start, len(whole) + block.stop)
        example[there], start[there], length[there] = others[block].T
    return Pieces(example, start, length, taken(cuttable, example)), too_long, cut


def _parts(
    examples: Examples, index: int, too_long: np.ndarray, cut: np.ndarray, pack: PackSettings
) -> list[tuple[int, int, int]]:
    """(Example, start, length) of what is kept of an example that is longer than a row; notes what is not."""
    policies = {"drop": _drop, "truncate_prompt_left": _keep_end, "truncate_target": _keep_start, "split": _split}
    policy = _split if examples.pretraining[index] else policies[pack.overflow]
    parts = _with_targets(examples, index, policy(examples, index, pack.max_seq_length))
    too_long[index] = not parts
    cut[index] = examples.lengths[index] - sum(length for _, length in parts)
    return [(index, *part) for part in parts]


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
