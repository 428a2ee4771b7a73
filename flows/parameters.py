"""The parameters of the flow are the fields of the configuration: same names, types, limits and descriptions.

In: `PandaSettings`. Out: an `inspect.Signature` and a docstring, from which Prefect makes the form and checks what is
submitted. Every parameter defaults to None, "as the YAML files say", so that a model's own values still apply.
Cost: none.
"""

import inspect
from typing import Annotated, Any

from pydantic import Field

from configs.settings import PandaSettings

INTRODUCTION = "Corpora in, registered model out: validate and shard, tokenize, pack, train, evaluate, register."
EXTRA = {
    "conf_path": (str | None, "YAML file whose values go over the template's."),
    "overrides": (list[str] | None, "Hydra overrides, key=value each."),
}


def flow_signature() -> inspect.Signature:
    """Keyword-only parameters of the flow, all of them optional."""
    fields = {name: (annotation, []) for name, (annotation, _) in EXTRA.items()}
    fields |= {name: (info.annotation | None, info.metadata) for name, info in PandaSettings.model_fields.items()}  # type: ignore[operator]
    return inspect.Signature([_parameter(name, *kind) for name, kind in fields.items()], return_annotation=dict)


def flow_docstring() -> str:
    """Google style, which Prefect reads the descriptions of the form from."""
    described = {name: text for name, (_, text) in EXTRA.items()}
    for name, info in PandaSettings.model_fields.items():
        described[name] = f"{info.description} Default: {info.default}."
    lines = [f"    {name}: {' '.join(text.split())}" for name, text in described.items()]
    return f"{INTRODUCTION}\n\nArgs:\n" + "\n".join(lines) + "\n"


def _parameter(name: str, annotation: Any, limits: list[Any]) -> inspect.Parameter:
    checked = Annotated[annotation, Field(None), *limits] if limits else annotation
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=checked)
