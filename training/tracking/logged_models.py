"""A finished run's models as MLflow ranks them: a logged model for each kept checkpoint, with its losses.

In: a run that has ended, its record and directory. Out: logged models in MLflow, each with its step, the tag
`panda.checkpoint` and metrics that carry `model_id` and the held-out data set; the registered model of the run gets
its metrics too. So `mlflow.search_logged_models` orders them by `metrics.eval/eval_loss`. The weights stay in
RUN/checkpoints: a checkpoint is resumed, the registered model is deployed. Every step can be repeated. Cost: five
requests a checkpoint.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from training import run_files
from training.tracking.run_record import HELD_OUT_CONTEXT, SERIES, RunRecord, metrics_of, new_lines
from training.tracking.tags import CHECKPOINT_TAG, COMMIT_TAG, SOURCE_NAME_TAG, SOURCE_TYPE_TAG, USER_TAG

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Metric
    from mlflow.tracking import MlflowClient

REGISTERED, CHECKPOINT = "panda", "panda-checkpoint"  # `model_type` of what is deployed, and of what is resumed
COMPLETE = "complete.json"  # what `checkpoint` writes last
WHOSE_TAGS = (USER_TAG, SOURCE_NAME_TAG, SOURCE_TYPE_TAG, COMMIT_TAG)
FINISHED = "FINISHED"
OF_STEP = {"step", "time", "loss"}  # what metrics.jsonl tells of a model; the rest is about the machine
NOT_IN_NAMES = re.compile(r"""[/:.%"']""")  # of a logged model; versions of models have dots: llama-3.1-8b


def send(client: "MlflowClient", record: RunRecord, run_dir: Path) -> None:
    """Log what a finished run has kept; a checkpoint that is gone is taken back."""
    if record.status != FINISHED:
        return  # it may go on, and then keeps others
    experiment = client.get_run(record.known_id).info.experiment_id
    known = client.search_logged_models([experiment], f"source_run_id = '{record.known_id}'")
    logged = {model.tags[CHECKPOINT_TAG]: model for model in known if CHECKPOINT_TAG in model.tags}
    kept = {
        str(marker.parent): marker for marker in sorted((run_dir / run_files.CHECKPOINTS).glob(f"step-*/{COMPLETE}"))
    }
    for path in logged.keys() - kept.keys():
        client.delete_logged_model(logged[path].model_id)
    for path, marker in kept.items():
        step = step_of(marker)
        model = logged.get(path) or _log(client, record, experiment, marker, step)
        _log_metrics(client, record, run_dir, model, step)
    registered = [model for model in known if model.model_type == REGISTERED and str(model.status) == "READY"]
    if registered:
        newest = max(registered, key=lambda model: model.creation_timestamp)
        _log_metrics(client, record, run_dir, newest, deployed_step(run_dir))


def step_of(marker: Path) -> int:
    """Optimizer steps that a checkpoint has done."""
    return int(run_files.read_json(marker)["progress"]["step"])


def deployed_step(run_dir: Path) -> int:
    """The step whose weights are RUN/model."""
    trained = run_files.read_json(run_dir / run_files.TRAINED)
    if trained.get("best_step") is None:
        return trained["steps"]
    return last_step(yaml.safe_load((run_dir / run_files.CONFIG).read_text(encoding="utf-8")), trained)


def last_step(config: dict[str, Any], trained: run_files.Trained) -> int:
    """The last step that the deployed weights have seen: the best one where that is kept."""
    best = trained.get("best_step")
    return best if best is not None and config["keep_best"] else trained["steps"]


def _log(client: "MlflowClient", record: RunRecord, experiment: str, marker: Path, step: int) -> "LoggedModel":
    model = client.create_logged_model(
        experiment,
        name=NOT_IN_NAMES.sub("-", f"{record.run_name}-{marker.parent.name}"),
        source_run_id=record.known_id,
        tags={CHECKPOINT_TAG: str(marker.parent)},
        params={"step": str(step)},
        model_type=CHECKPOINT,
    )
    client.log_model_artifact(model.model_id, str(marker))
    return client.finalize_logged_model(model.model_id, "READY")


def _metrics_at(
    step: int, record: RunRecord, path: Path, of: dict[str, str], names: set[str] | None = None
) -> "list[Metric]":
    """Metrics of the lines of one step: those of the run itself, so that it has none of them twice."""
    lines = [line for line in new_lines(path, 0)[1] if line.get("step") == step]
    wanted = [{name: value for name, value in line.items() if names is None or name in names} for line in lines]
    return [metric for line in wanted for metric in metrics_of(line, SERIES[path.name], record.started_ms, **of)]


def _log_metrics(client: "MlflowClient", record: RunRecord, run_dir: Path, model: "LoggedModel", step: int) -> None:
    """Metrics of the run at this step as metrics of this model; the model as an output of the run."""
    from mlflow.entities import LoggedModelOutput

    of = {"model_id": model.model_id}
    held_out = next((one for one in record.datasets if one["context"] == HELD_OUT_CONTEXT), None)
    on = {"dataset_name": held_out["name"], "dataset_digest": held_out["digest"][:36]} if held_out else {}
    metrics = [
        *_metrics_at(step, record, run_dir / run_files.METRICS, of, OF_STEP),
        *_metrics_at(step, record, run_dir / run_files.EVALUATIONS, of | on),
    ]
    client.log_batch(record.known_id, metrics=metrics)
    client.set_logged_model_tags(model.model_id, {tag: record.tags[tag] for tag in WHOSE_TAGS if tag in record.tags})
    outputs = client.get_run(record.known_id).outputs
    if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        client.log_outputs(record.known_id, [LoggedModelOutput(model.model_id, step)])
