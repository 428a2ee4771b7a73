"""The flow `panda-evaluate`: held-out loss of the model that a finished run has left on disk.

In: the run (`output_dir`, `run_name`; the newest by default), evaluated with the settings it was trained with. Out:
losses by source, also RUN/evaluation.json.
No `from __future__ import annotations` here: `flow.serve` fails on it.
"""

import json
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.runtime import flow_run

from data_prep.errors import PandaError
from flows.parts import flow_states, run_dir
from flows.parts.form import flow_of_settings, read
from flows.parts.lifetime import begin
from flows.parts.notify import on_bad_end
from tasks.train import evaluate
from training import run_files
from training.launch.run_config import read_config
from training.run_files import Trained

INTRODUCTION = "Held-out loss of the model of a finished run, as it lies on disk."
SETTINGS = {"output_dir", "run_name", "notify"}


def panda_evaluate(**parameters: Any) -> State[Any]:
    """Replaced below: the form and the reference are made from the settings classes."""
    begin()
    try:
        settings = read(parameters).settings
        run = run_dir.create(settings.model_copy(update={"resume": True}))
        as_trained = read_config(run.path / run_files.CONFIG).settings
        losses = evaluate(run.path, as_trained, _trained(run.path), everything=True)
    except flow_states.ERRORS as error:
        return flow_states.ended_by(error)
    message = ", ".join(f"{source} {loss:.4f}" for source, loss in losses["after"].items())
    said = f"held-out loss: {message}" if message else "no record is held out (validation_fraction)"
    summary: run_dir.Summary = {"run_dir": str(run.path), "losses": losses}
    return flow_states.completed(flow_states.with_outcome(summary, "Evaluated", said))


def _trained(run: Path) -> Trained:
    """What training said when it was done."""
    path = run / run_files.TRAINED
    if not path.exists():
        raise PandaError(f"{run}: there is no {run_files.TRAINED}, so this run has not been trained to its end")
    return json.loads(path.read_text(encoding="utf-8"))


def _title() -> str:
    return f"evaluate {flow_run.parameters.get('run_name') or 'the newest run'}"


panda_evaluate = flow_of_settings(
    panda_evaluate,
    INTRODUCTION,
    SETTINGS,
    name="panda-evaluate",
    flow_run_name=_title,
    persist_result=False,
    on_failure=[on_bad_end],
    on_crashed=[on_bad_end],
    on_cancellation=[on_bad_end],
)
