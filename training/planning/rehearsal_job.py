"""What is to be rehearsed and what is found, between `panda plan --exact` and the process that plays it.

In: nothing. Out: `Rehearsal`, which `training.planning.rehearsal` reads as JSON, and the `PlayedPhase`s it writes. Both
sides know them, and the side that asks imports no torch. Cost: none.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed. `settings`: those of training as JSON; the model is a checkpoint's or `architecture`."""

    settings: dict[str, Any]
    model_dir: str | None
    ranks: int
    is_gpu: bool
    num_tokens: int  # of a row
    num_segments: int = 1  # in a row


@dataclass(frozen=True)
class PlayedPhase:
    """What a rank needs in one part of a run. Bytes, on the device and beside it in CPU memory, sent once in `per`."""

    name: str
    held: int  # before it, and mostly after it
    peak: int
    host: int
    sent: int
    per: str
