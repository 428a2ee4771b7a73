"""The champion as the starting point of the next training. In: settings. Out: its directory, or None."""

import logging
from pathlib import Path

from configs.settings import PandaSettings
from tasks.register import model_name
from training.errors import CheckpointError
from training.settings import TrackingSettings
from training.tracking import tracking_uri
from training.versions import Registry

logger = logging.getLogger(__name__)


def registry_of(settings: PandaSettings) -> Registry:
    """The registry of the run's MLflow."""
    return Registry(tracking_uri(TrackingSettings.of(settings), Path(settings.output_dir).absolute()))


def champion_directory(settings: PandaSettings) -> Path | None:
    """Weights and tokenizer of the champion; None when the base is wanted, or nobody is champion yet."""
    if settings.init_from != "champion":
        return None
    registry, name = registry_of(settings), model_name(settings.registered_model_name, settings.model)
    champion = registry.champion(name)
    if champion is None:
        logger.info("%s has no champion yet: starting from the base model", name)
        return None
    folder = registry.files(champion, Path(settings.cache_dir))
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"init_from=champion: {champion.uri} is an adapter, and training starts from whole weights; "
            "merge it into its base, or use init_from=base"
        )
    logger.info("starting from the champion %s", champion.uri)
    return folder
