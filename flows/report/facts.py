"""What the page of a run tells, looked up in the files of the run and in its plan.

In: the run directory and its summary. Out: `Facts`; what is not there is empty, for a run may end anywhere. Cost: the
metric files once, and of a plan the ledger and a few examples: a second for a million records.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from data_prep.inspection.inspect import Inspection, inspect_plan
from data_prep.plan.ledger import open_ledger
from data_prep.tokenizer import load_tokenizer
from flows.parts.run_dir import Summary
from flows.report.charts import Points
from training import run_files
from training.comparison.job import GateResult
from training.tracking.looks import only_a_look
from training.tracking.redact import redact
from training.tracking.run_record import new_lines

LINES_PER_REASON = 3
Found = TypeVar("Found")


@dataclass(frozen=True)
class Facts:
    """Everything that is shown."""

    run_dir: Path
    summary: Summary
    gate: GateResult | None = None  # with the answers, which the summary has not
    config: dict[str, Any] = field(default_factory=dict)
    loss: Points = field(default_factory=list)
    held_out: Points = field(default_factory=list)
    speed: Points = field(default_factory=list)  # target tokens per second
    utilisation: Points = field(default_factory=list)  # of the model's FLOPs
    data: Inspection | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason -> FILE:LINE


def collect(run_dir: Path, summary: Summary) -> Facts:
    """Look at all of it; what cannot be read is left out, with a warning."""
    steps = new_lines(run_dir / run_files.METRICS, 0)[1]
    evaluations = new_lines(run_dir / run_files.EVALUATIONS, 0)[1]
    config = _or_nothing("the configuration", lambda: _config(run_dir)) or {}
    paths = config.get("paths", {})
    plan_dir, tokenizer_dir = paths.get("plan_dir"), paths.get("tokenizer_dir")
    inspected = None
    if plan_dir and tokenizer_dir:
        tokenizer = _or_nothing("the tokenizer", lambda: load_tokenizer(Path(tokenizer_dir)))
        if tokenizer:
            inspected = _or_nothing("the examples", lambda: inspect_plan(Path(plan_dir), tokenizer, num_examples=1))
    return Facts(
        run_dir=run_dir,
        summary=summary,
        gate=_or_nothing("the gate", lambda: _json(run_dir / run_files.GATE)),
        config=config,
        loss=_points(steps, "loss"),
        held_out=_points(evaluations, "eval_loss"),
        speed=_points(steps, "target_tokens_per_second"),
        utilisation=_points(steps, "mfu"),
        data=inspected,
        left_out=_or_nothing("the records left out", lambda: left_out(Path(plan_dir))) or {} if plan_dir else {},
    )


def left_out(plan_dir: Path) -> dict[str, list[str]]:
    """A few records of each reason for which one was rejected or dropped, as FILE:LINE."""
    table = open_ledger(plan_dir).table
    found = {}
    for reason in table["reason"].cast(pa.string()).unique().drop_null().to_pylist():
        rows = pc.indices_nonzero(pc.equal(table["reason"], pa.scalar(reason)))[:LINES_PER_REASON]
        places = table.select(["file", "line"]).take(rows).to_pylist()
        found[reason] = [f"{one['file']}:{one['line']}" for one in places]
    return found


def _points(lines: list[dict[str, Any]], name: str) -> Points:
    return [(float(line["step"]), float(line[name])) for line in lines if line.get(name) is not None]


def _config(run_dir: Path) -> dict[str, Any]:
    return redact(yaml.safe_load((run_dir / run_files.CONFIG).read_text(encoding="utf-8")))


def _json(path: Path) -> Any:
    return run_files.read_json(path) if path.exists() else None


def _or_nothing(what: str, look: Callable[[], Found]) -> Found | None:
    with only_a_look(f"{what} in the report"):
        return look()
    return None
