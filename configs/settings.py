"""The whole configuration as one flat class: a field = a flag = a form field = an MLflow param.

In: plain values (flags, YAML, form). Out: a frozen `PandaSettings`. Each stage takes its own group out of it with
`Group.of(settings)`. Imports nothing heavy.
"""

from typing import Literal

from pydantic import Field

from data_prep.settings import CorpusSettings, PackSettings, SeedSettings, Settings, TokenizeSettings
from training.settings import (
    BatchSettings,
    CheckpointSettings,
    EngineSettings,
    GateSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    TrackingSettings,
    TrainSettings,
)


class RunSettings(Settings):
    """Run: where things go"""

    output_dir: str = Field("./outputs", description="Directory of the runs and of the MLflow database.")
    cache_dir: str = Field("./cache", description="Directory of prepared data, shared by all runs.")
    run_name: str | None = Field(
        None, pattern=r"^[\w.-]+$", description="Name of the run and its directory; None = date, time and model."
    )
    resume: bool = Field(
        False, description="Go on with the run `run_name` (the newest run when not given) from its newest checkpoint."
    )
    preset: Literal["lora", "qlora", "full"] | None = Field(
        None, description="Modern values for a way of training (see configs/preset); your flags still win."
    )


class PandaSettings(
    CorpusSettings, TokenizeSettings, PackSettings, TrainSettings, TrackingSettings, GateSettings, RunSettings
):
    """Everything `panda-train` can be told."""


GROUPS: tuple[type[Settings], ...] = (
    RunSettings,
    CorpusSettings,
    TokenizeSettings,
    PackSettings,
    ModelSettings,
    LoraSettings,
    OptimizerSettings,
    BatchSettings,
    EngineSettings,
    CheckpointSettings,
    TrackingSettings,
    GateSettings,
    SeedSettings,
)
"""The groups in the order in which help, form and reference show them."""


def fields_by_group() -> dict[str, list[str]]:
    """Title of each group -> the names it owns (a field that several groups share is shown once, with its base)."""
    shared = set(SeedSettings.model_fields)
    titles = {}
    for group in GROUPS:
        names = [name for name in group.model_fields if name not in shared or group is SeedSettings]
        titles[(group.__doc__ or group.__name__).strip()] = names
    return titles
