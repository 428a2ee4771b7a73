"""Task of evaluation: the model as it lies on disk, on the held-out rows, in a process of its own.

In: the run directory. Out: held-out loss before and after training by source. Reading RUN/model back proves what is
deployed, not what was in memory.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_prep.errors import PandaError
from tasks.artifacts import show_evaluation
from tasks.stage import stage


@stage("evaluate")
def evaluate(run_dir: Path, trained: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Losses by moment and source: ``{"before": {"all": 8.3, "instruction": 8.4}, "after": {...}}``."""
    command = [sys.executable, "-m", "training.evaluate", "--config", str(run_dir / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PandaError(f"evaluation of {run_dir / 'model'} failed:\n{done.stderr.strip()}")
    after = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    losses = {"before": _losses(trained.get("evaluation_before", {})), "after": _losses(after)}
    show_evaluation(losses)
    return losses


def _losses(by_source: dict[str, dict[str, float]]) -> dict[str, float]:
    return {source: numbers["loss"] for source, numbers in by_source.items()}
