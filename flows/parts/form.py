"""The parameters of a flow are the fields of the configuration: same names, types, limits and descriptions.

In: `PandaSettings`. Out: a Prefect flow whose form and checks at submission are made from the settings classes. Every
parameter defaults to None, "as the YAML files say", so that a model's own values still apply; the form shows such a
field empty, its group in front of its name: first what people change first, then the rest in the order of `--help`.
Cost: 0.1 s.

From the parameters of a flow to its configuration. In: parameters, None = not given. Out: `Loaded`, checked.

A run that is gone on with gives the values that the parameters do not. Parameters that come over the network may say
only what `flows.parts.permission` lets them; every flow reads its parameters here.

Cost: composing the YAML, 0.3 s, and a look at the names of the corpus files.

The name of a flow run: date, model, data, purpose; at its end also the version and what the gate says of it.

In: the parameters of the run; its summary. Out: text; another name of the flow run. Cost: composing YAML; a request.
"""

import inspect
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from pydantic import MISSING, Field, TypeAdapter, WithJsonSchema

from configs.field_types import allowed
from configs.load import Loaded, load
from configs.settings import PandaSettings, fields_by_group
from data_prep.errors import PandaError
from data_prep.places.address import is_address
from flows.parts import permission, preflight
from flows.parts.overview import verdict_of
from flows.parts.policy import is_scheduled
from flows.parts.run_dir import Summary, as_in_the_run

INTRODUCTION = "Corpora in, registered model out: validate and shard, tokenize, pack, train, evaluate, register."
CHANGED_FIRST = (
    "conf_path", "model", "ckpt_path", "instruction_tuning_data_dir", "pretraining_data_dir", "num_train_epochs",
    "max_steps", "learning_rate", "per_gpu_train_batch_size", "gradient_accumulation_steps", "max_seq_length",
    "use_lora", "lora_r", "use_quant", "num_processes", "zero_stage", "eval_steps", "registered_model_name", "run_name",
    "resume",
)  # fmt: skip
EXTRA = {
    "conf_path": (str | None, "YAML file whose values go over the template's."),
    "overrides": (list[str] | None, "Hydra overrides, key=value each."),
}


def flow_of_settings(
    function: Callable[..., Any], introduction: str = INTRODUCTION, names: set[str] | None = None, **options: Any
) -> Flow[..., Any]:
    """`function(**parameters)` as a flow with one parameter per setting.

    :param names: the settings the flow uses; None = all.
    """
    parameters = _parameters(names)
    function.__signature__ = inspect.Signature(parameters, return_annotation=dict)  # type: ignore[attr-defined]  # Prefect reads it
    function.__doc__ = _docstring(introduction, names)
    flow = Flow(function, **options)
    # The form is made from this one. A default of None would be shown as text "null", and submitted.
    form = [parameter.replace(default=MISSING) for parameter in parameters]
    flow.__signature__ = inspect.Signature(form, return_annotation=dict)  # type: ignore[attr-defined]  # the form does
    return flow


def _parameters(names: set[str] | None) -> list[inspect.Parameter]:
    """Keyword-only and optional: what people change first, then the others in the order of `--help`."""
    parameters = [_parameter(name, "Files", annotation, []) for name, (annotation, _) in EXTRA.items()]
    for title, fields in fields_by_group().items():
        group = title.split(":")[0]
        for name in fields:
            info = PandaSettings.model_fields[name]
            if names is None or name in names:
                parameters.append(_parameter(name, group, info.annotation, info.metadata))
    places = {name: place for place, name in enumerate(CHANGED_FIRST)}
    return sorted(parameters, key=lambda parameter: places.get(parameter.name, len(places)))


def _docstring(introduction: str, names: set[str] | None) -> str:
    """Google style, which Prefect reads the descriptions of the form from."""
    described = {name: text for name, (_, text) in EXTRA.items()}
    for name, info in PandaSettings.model_fields.items():
        if names is None or name in names:
            limits = allowed(name)
            described[name] = f"{info.description} {limits[:1].upper()}{limits[1:]}. Default: {_default(info.default)}."
    lines = [f"    {name}: {' '.join(text.split())}" for name, text in described.items()]
    return f"{introduction}\n\nArgs:\n" + "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    return "none" if value is None else str(value)


def _parameter(name: str, group: str, annotation: Any, limits: list[Any]) -> inspect.Parameter:
    """None is what a field holds that nobody filled in; the form need not offer it as a type of its own."""
    schema = _without_null(TypeAdapter(Annotated[annotation, *limits] if limits else annotation).json_schema())
    titled = Field(None, json_schema_extra={"title": f"{group} · {name}"})
    form = Annotated[annotation | None, titled, *limits, WithJsonSchema(schema)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=form)


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    if len(kinds) == 1:
        return rest | kinds[0]
    if rest.get("type") == "boolean":
        return {"enum": [True, False]}  # a list to choose from: a switch cannot show "not filled in"
    return rest | {"anyOf": kinds} if kinds else rest


_titled: dict[str, Loaded] = {}
"""What the name of a flow run was made from, by its id, for the run itself: composing YAML costs 0.1 s."""


def read(parameters: dict[str, Any], goes_on: bool = False) -> Loaded:
    """The configuration that the parameters make; `goes_on` takes the rest from the run to resume, if there is one."""
    given = {name: value for name, value in parameters.items() if value is not None}
    foreign = permission.check_parameters(given)
    overrides, conf_path = given.pop("overrides", None), given.pop("conf_path", None)
    loaded = _titled.pop(flow_run.id, None) or load(given, overrides, conf_path)
    permission.check_settings(loaded.settings, foreign)
    if goes_on and not conf_path:
        loaded = as_in_the_run(loaded, given, overrides)
        permission.check_settings(loaded.settings, foreign)
    return loaded


def configure(parameters: dict[str, Any]) -> Loaded:
    """The configuration that the parameters make, checked as far as possible without work."""
    loaded = read(parameters, goes_on=True)
    preflight.check(loaded.settings, {name for name, origin in loaded.origins.items() if origin != "default"})
    return loaded


logger = logging.getLogger(__name__)


def run_title() -> str:
    """`2026-11-24 panda-tiny on instructions: LoRA, scheduled`."""
    try:
        loaded = read(flow_run.parameters)
    except PandaError:
        return f"{_today()} configuration error"
    settings = loaded.settings
    if flow_run.id:
        _titled[flow_run.id] = loaded
    model = Path(settings.ckpt_path or settings.model).name
    return f"{_today()} {model} on {_data(settings)}: {', '.join(_purpose(settings))}"


def add_result(summary: Summary) -> None:
    """`... → version 3, champion`; a name that cannot be changed is a warning, never a failure."""
    run_id = flow_run.id
    if "model" not in summary or run_id is None:
        return
    verdict = f", {verdict_of(summary)}" if "gate" in summary else ""
    name = f"{flow_run.name} → version {summary['model']['version']}{verdict}"
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(run_id, name=name)
    except Exception:
        logger.warning("the flow run keeps its name", exc_info=True)


def _today() -> str:
    return time.strftime("%Y-%m-%d")


def _data(settings: PandaSettings) -> str:
    folders = [settings.instruction_tuning_data_dir, settings.pretraining_data_dir]
    return (
        " + ".join(Path(folder).name for folder in folders if folder and (is_address(folder) or Path(folder).is_dir()))
        or "no corpus"
    )


def _purpose(settings: PandaSettings) -> list[str]:
    train = "QLoRA" if settings.use_quant else "LoRA" if settings.use_lora else "all weights"
    facts = {
        train: True,
        "scheduled": is_scheduled(),
        "from the champion": settings.init_from == "champion",
        f"from {settings.from_stage}": settings.from_stage,
        f"until {settings.until_stage}": settings.until_stage,
        "resumed": settings.resume,
    }
    return [text for text, holds in facts.items() if holds]
