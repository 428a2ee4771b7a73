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
    CostSettings,
    EngineSettings,
    GateSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    SpikeSettings,
    TrackingSettings,
    TrainSettings,
)

Stage = Literal["records", "tokenize", "plan", "train", "evaluate", "register", "gate"]


class RunSettings(Settings):
    """Run: where things go"""

    output_dir: str = Field("./outputs", description="Directory of the runs and of the MLflow database.")
    cache_dir: str = Field("./cache", description="Directory of prepared data, shared by all runs.")
    prepare_cluster: str | None = Field(
        None,
        pattern=r"^\w+://.+$",
        examples=["tcp://host:8786"],
        description="Address of a Dask scheduler, whose workers read and tokenize the corpus; "
        "None = processes of this machine (`prepare_workers`). Changes no byte of the output.",
    )
    run_name: str | None = Field(
        None,
        pattern=r"^\w[\w.-]*$",
        examples=["week-48"],
        description="Name of the run and its directory; None = date, time and model.",
    )
    resume: bool = Field(
        False,
        description="Go on with the run `run_name` (the newest run when not given) from its newest checkpoint; "
        "what is not given is as in that run.",
    )
    metrics_port: int | None = Field(
        None,
        ge=1024,
        le=65535,
        description="Port of this machine's loopback where Prometheus finds step, loss, tokens a second and the rest "
        "while a run trains; None = nowhere.",
    )
    preset: Literal["lora", "qlora", "full"] | None = Field(
        None, description="Modern values for a way of training (see configs/preset); your flags still win."
    )


class UnattendedSettings(Settings):
    """Unattended runs: when to train, from what, who is asked and told"""

    from_stage: Stage | None = Field(
        None,
        description="Start at this stage of the run to resume, with what the stages before it have left there.",
    )
    until_stage: Stage | None = Field(None, description="Stop after this stage.")
    min_new_target_tokens: int = Field(
        0,
        ge=0,
        description="Train only when the corpus has at least so many target tokens more than the newest registered "
        "version was made of. 0 = always; a scheduled run always needs a corpus that has changed.",
    )
    init_from: Literal["base", "champion"] = Field(
        "base", description="Start from the base model, or from the registered version with the alias `champion`."
    )
    corpus_alarm: Literal["off", "warn", "stop", "approve"] = Field(
        "warn",
        description="When the corpus differs from the champion's in a way that a person would look into (lengths, "
        "scripts, wording, duplicates, sources, ...): tell (warn), end the run (stop), or wait for a person's answer "
        "before training (approve).",
    )
    require_approval: bool = Field(
        False,
        description="A version that has passed the gate waits until a person approves in the Prefect UI; only then it "
        "becomes the champion.",
    )
    approval_timeout_hours: float = Field(
        24, gt=0, description="Without an answer for so long, the version stays challenger."
    )
    notify: str | None = Field(
        None,
        pattern=r"^[\w-]+/[\w-]+$",
        examples=["slack-webhook/team"],
        description="Prefect notification block, type/name, that is told of new versions, of a corpus that "
        "has changed, of runs that failed, crashed, were cancelled or wait for approval, and of schedules that train "
        "nothing.",
    )
    notify_after_skips: int = Field(
        3, ge=1, description="Tell `notify` when so many scheduled runs in a row were skipped, and so many later again."
    )
    notify_after_days: float = Field(
        8, gt=0, description="Tell `notify` when no run has succeeded for so many days though a schedule is active."
    )
    max_restarts: int = Field(
        3,
        ge=0,
        le=20,
        description="How often a deployed run that crashed (process, worker, machine or server lost) is started again "
        "by itself, from its newest checkpoint, as long as `panda up` is up. 0 = never.",
    )
    keep_versions: int = Field(
        5,
        ge=1,
        description="`panda gc` keeps so many of the newest versions of each model, beside those with an alias and "
        "what these were made of.",
    )
    keep_days: float = Field(
        30,
        ge=0,
        description="`panda gc` keeps what is younger: versions, runs, checkpoints, prepared data, runs in MLflow.",
    )


class PandaSettings(
    CorpusSettings,
    TokenizeSettings,
    PackSettings,
    TrainSettings,
    TrackingSettings,
    GateSettings,
    RunSettings,
    UnattendedSettings,
):
    """Everything `panda-train` can be told."""


GROUPS: tuple[type[Settings], ...] = (
    RunSettings,
    UnattendedSettings,
    CorpusSettings,
    TokenizeSettings,
    PackSettings,
    ModelSettings,
    LoraSettings,
    OptimizerSettings,
    BatchSettings,
    EngineSettings,
    CheckpointSettings,
    SpikeSettings,
    CostSettings,
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
