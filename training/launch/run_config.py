"""RUN/config.yaml as training reads it: the settings it knows and where things are.

In: a flat YAML mapping of the whole configuration with `paths: {plan_dir, model_dir, tokenizer_dir, run_dir}`. Out:
`RunConfig`. Keys of other stages are ignored: the file is the record of the whole run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import PandaError
from data_prep.settings import PackSettings, TokenizeSettings
from training.settings import TrainSettings


@dataclass(frozen=True)
class RunConfig:
    """What the worker needs to know."""

    settings: TrainSettings
    packing: bool  # several segments in a row
    max_seq_length: int | None  # None = the file does not say
    template: str | dict[str, Any]  # prompt template the data was made with
    plan_dir: Path
    tokenizer_dir: str
    model_dir: str | None  # None = from scratch
    run_dir: Path


def read_config(path: Path) -> RunConfig:
    """Read and validate; a PandaError names the file and the field."""
    try:
        content = yaml.safe_load(path.read_text())
        paths = content["paths"]
        return RunConfig(
            settings=TrainSettings(**{name: content[name] for name in TrainSettings.model_fields if name in content}),
            packing=content.get("packing", PackSettings.model_fields["packing"].default),
            max_seq_length=content.get("max_seq_length"),
            template=content.get("template", TokenizeSettings.model_fields["template"].default),
            plan_dir=Path(paths["plan_dir"]),
            tokenizer_dir=str(paths["tokenizer_dir"]),
            model_dir=paths.get("model_dir"),
            run_dir=Path(paths["run_dir"]),
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise PandaError(f"{path}: not a run configuration ({type(error).__name__}: {error})") from error
