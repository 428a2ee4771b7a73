"""The flow `panda-train`: validate and shard -> tokenize -> plan packing -> train -> evaluate -> register.

In: the configuration as parameters (all optional; the YAML files give the rest). Out: the summary of the run, which is
also RUN/summary.json. The flow is order and meaning of failures; every stage is a task of its own, skips itself when
its work is there, and can be read in `tasks/`. No `from __future__ import annotations` here: `flow.serve` fails on it.
"""

from typing import Any

from prefect import flow
from prefect.states import Failed

from configs.load import load
from configs.settings import PandaSettings
from data_prep.errors import PandaError
from flows import preflight, run_dir
from flows.parameters import flow_docstring, flow_signature
from flows.stopwatch import Stopwatch
from tasks.evaluate import evaluate
from tasks.prepare import base_model, plan, shard, tokenize, tokenizer
from tasks.register import register_model
from tasks.train import train
from training import tracking
from training.settings import TrainSettings
from training.source import base_checkpoint


def panda_train(**parameters: Any) -> dict[str, Any]:
    """Replaced below: the form and the reference are made from the settings classes."""
    given = {name: value for name, value in parameters.items() if value is not None}
    try:
        loaded = load(given, given.pop("overrides", None), given.pop("conf_path", None))
        preflight.check(loaded.settings, {name for name, origin in loaded.origins.items() if origin != "default"})
        run = run_dir.create(loaded.settings)
        summary = run_stages(loaded.settings, run)
        run_dir.write_summary(run, summary)
    except PandaError as error:
        return Failed(message=str(error), data=error)  # type: ignore[return-value]  # Prefect takes a state as the result
    return summary


def run_stages(settings: PandaSettings, run: run_dir.RunDir) -> dict[str, Any]:
    """All stages in order; returns the summary."""
    watch = Stopwatch()
    with watch("records"):
        records = shard(settings)
    with watch("base model"):
        checkpoint = base_checkpoint(settings)
        model_dir = base_model(checkpoint) if checkpoint else None
        tokenizer_dir = model_dir or tokenizer(settings, records)
    with watch("tokenize"):
        tokens = tokenize(settings, records, tokenizer_dir)
    with watch("plan"):
        planned = plan(settings, tokens)
    paths = {"run_dir": run.path, "plan_dir": planned.path, "model_dir": model_dir, "tokenizer_dir": tokenizer_dir}
    run_dir.write_config(run, settings, paths)
    with tracking.open_run(settings, run.path, planned) as tracked:
        with watch("train"):
            trained = train(run.path, TrainSettings.of(settings), tracked.update)
        with watch("evaluate"):
            evaluation = evaluate(run.path, trained)
        with watch("register"):
            version = register_model(settings, run.path, tracked, planned, evaluation)
    return {
        "run_dir": str(run.path),
        "mlflow_run_id": tracked.run_id,
        "model": version,
        "data": planned.report,
        "losses": evaluation,
        "training": trained,
        "seconds": watch.seconds,
    }


panda_train.__signature__ = flow_signature()  # type: ignore[attr-defined]
panda_train.__doc__ = flow_docstring()
panda_train = flow(name="panda-train", flow_run_name="{model}", persist_result=False)(panda_train)
