"""The name of a flow run: model, data, purpose. In: the parameters of the run. Out: text. Cost: composing the YAML."""

from pathlib import Path

from prefect.runtime import flow_run

from configs.load import load
from configs.settings import PandaSettings
from data_prep.errors import PandaError
from flows.policy import is_scheduled


def run_title() -> str:
    """`panda-tiny on my/instructions: LoRA, scheduled`."""
    given = {name: value for name, value in flow_run.parameters.items() if value is not None}
    try:
        settings = load(given, given.pop("overrides", None), given.pop("conf_path", None)).settings
    except PandaError:
        return "configuration error"
    return f"{Path(settings.ckpt_path or settings.model).name} on {_data(settings)}: {', '.join(_purpose(settings))}"


def _data(settings: PandaSettings) -> str:
    folders = [settings.instruction_tuning_data_dir, settings.pretraining_data_dir]
    return " + ".join(Path(folder).name for folder in folders if folder and Path(folder).is_dir()) or "no corpus"


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
