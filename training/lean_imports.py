"""Importing large libraries without what they pull in and training never uses, and without what they say in vain.

In: names of packages. Out: a block in which they count as not installed. deepspeed's autotuner imports mlflow (1.2 s),
transformers' detection losses scipy (0.4 s), pyarrow's conversions pandas (0.3 s). After the block they can be
imported again.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("mlflow", "pandas", "scipy", "sklearn")


@contextmanager
def without(*names: str) -> Iterator[None]:
    """`import name` raises ImportError in the block, for packages that are not imported yet."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def silence_vain_warnings() -> None:
    """Ignore what libraries say of each other and no user can mend.

    peft and deepspeed call functions that transformers and torch have deprecated; bitsandbytes misses a CPU kernel that
    `training.models.build.keep_differentiable` would forbid.
    """
    for name in ("is_gradient_checkpointing", "torch.distributed.all_gather_into_tensor"):
        warnings.filterwarnings("ignore", message=f"`{name}` is deprecated", category=FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
