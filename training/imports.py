"""Importing large libraries without what they pull in and training never uses.

In: names of packages. Out: a block in which they count as not installed. deepspeed's autotuner imports mlflow (1.2 s),
transformers' detection losses scipy (0.4 s), pyarrow's conversions pandas (0.3 s). After the block they can be
imported again.
"""

import sys
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
