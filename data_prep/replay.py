"""Going on from an earlier model: of the records that were trained on before, only a share is trained on again.

In: the plan of the earlier training (its directory), the share, content hashes. Out: which records are left out. The
share is chosen by content hash, so a larger one only adds. Records a plan left out for this reason count as trained on
by the plans after it. Cost: reading three columns of the earlier ledger, a second per million records.
"""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from data_prep.duplicates import is_among
from data_prep.errors import CorpusError
from data_prep.ledger import Reason
from data_prep.order import uniform
from data_prep.reader import LEDGER_FILE
from data_prep.records import read_arrow
from data_prep.settings import CorpusSettings

_KEY = 0x01D  # not the seed: which old records are left out depends on them alone


def left_out(hashes: np.ndarray, keys: np.ndarray, corpus: CorpusSettings) -> np.ndarray:
    """``(n, 16) uint8`` hashes and their ``(n,)`` keys -> ``(n,) bool``."""
    if corpus.replay_of is None or corpus.replay_share == 1:
        return np.zeros(len(hashes), dtype=bool)
    known = is_among(hashes, trained_on(Path(corpus.replay_of)))
    return known & (uniform(keys, _KEY) >= corpus.replay_share)


def trained_on(plan_dir: Path) -> np.ndarray:
    """Content hashes ``(m, 16) uint8`` of the training records of a plan, and of what it counted as trained on before.

    :raises CorpusError: there is no such plan.
    """
    try:
        ledger = read_arrow(plan_dir / LEDGER_FILE).select(["hash", "split", "reason"])
    except FileNotFoundError:
        raise CorpusError(f"replay_of={str(plan_dir)!r}: no plan there (no {LEDGER_FILE})") from None
    trained = pc.or_kleene(pc.equal(ledger["split"], "train"), pc.equal(ledger["reason"], Reason.NOT_REPLAYED.value))
    column = ledger["hash"].filter(trained)
    return np.frombuffer(b"".join(column.to_pylist()), dtype=np.uint8).reshape(-1, 16)
