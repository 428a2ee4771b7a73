"""Real corpora to run against, where there are some: never part of the project, named by PANDA_REAL_CORPORA."""

import os
from pathlib import Path

REAL = Path(os.environ.get("PANDA_REAL_CORPORA", Path(__file__).parents[3] / "shared" / "data" / "real"))
