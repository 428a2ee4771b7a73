"""The flow `panda-train`: validate and shard -> tokenize -> plan packing -> train -> evaluate -> register -> gate.

In: the configuration as parameters (all optional; the YAML files give the rest). Out: the summary of the run, which is
also RUN/summary.json. The flow is order and meaning of failures; every stage is a task of its own, skips itself when
its work is there, and can be read in `tasks/`. No `from __future__ import annotations` here: `flow.serve` fails on it.
"""

from pathlib import Path
from typing import Any

from prefect.runtime import flow_run
from prefect.states import Failed

from configs.load import load
from configs.settings import PandaSettings
from data_prep.errors import PandaError
from flows import preflight, run_dir
from flows.facts import facts, version_tags
from flows.parameters import flow_of_settings
from flows.stopwatch import Stopwatch
from tasks.gate import gate
from tasks.prepare import base_model, plan, shard, tokenize, tokenizer
from tasks.register import model_name, register_model
from tasks.sample_prompt import sample_prompt
from tasks.train import evaluate, train
from training import tracking
from training.settings import TrackingSettings, TrainSettings
from training.source import base_checkpoint

DEFAULT_MODEL = PandaSettings.model_fields["model"].default


def run_title() -> str:
    """Name of the flow run: the model, or the file or checkpoint that says which."""
    given = flow_run.parameters
    return str(given.get("model") or given.get("ckpt_path") or given.get("conf_path") or DEFAULT_MODEL)


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
        model_dir = base_model(settings) if base_checkpoint(settings) else None
        tokenizer_dir = model_dir or tokenizer(settings, records)
    with watch("tokenize"):
        tokens = tokenize(settings, records, tokenizer_dir)
    with watch("plan"):
        planned = plan(settings, tokens)
    paths = {"run_dir": run.path, "plan_dir": planned.path, "model_dir": model_dir, "tokenizer_dir": tokenizer_dir}
    run_dir.write_config(run, settings, paths)
    train_settings = TrainSettings.of(settings)
    known = facts(settings, tokens, planned)
    with tracking.open_run(TrackingSettings.of(settings), run.path, known) as tracked:
        with watch("train"):
            trained = train(run.path, train_settings, settings.resume)
        with watch("evaluate"):
            losses = evaluate(run.path, train_settings, trained)
        with watch("register"):
            prompt = sample_prompt(Path(planned.path), tokenizer_dir, Path(settings.cache_dir))
            name = model_name(settings.registered_model_name, settings.model)
            version = register_model(tracked, name, version_tags(known, losses), prompt)
        with watch("gate"):
            verdict = gate(tracked, settings, version)
    return {
        "run_dir": str(run.path),
        "prefect_flow_run_id": str(flow_run.id),
        "mlflow_run_id": tracked.run_id,
        "model": version,
        "gate": verdict,
        "data": planned.report,
        "losses": losses,
        "training": trained,
        "seconds": watch.seconds,
    }


panda_train = flow_of_settings(panda_train, name="panda-train", flow_run_name=run_title, persist_result=False)
