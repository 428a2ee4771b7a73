"""The champion as the starting point of the next training. In: settings. Out: its directory and its plan, or None."""

import logging
from pathlib import Path

from configs.settings import PandaSettings
from data_prep.errors import PandaError
from tasks.register import model_name
from training.errors import CheckpointError
from training.registry.lineage import config_of, plan_of
from training.registry.register import with_retries
from training.registry.versions import Registry, Version
from training.settings import TrackingSettings
from training.tracking.run import tracking_uri

logger = logging.getLogger(__name__)


def registry_of(settings: PandaSettings) -> Registry:
    """The registry of the run's MLflow."""
    return Registry(tracking_uri(TrackingSettings.of(settings), Path(settings.output_dir).absolute()))


def champion_of(settings: PandaSettings) -> Version | None:
    """The champion of the model that this run adds to; None as long as there is none."""
    return with_retries(lambda: champion_if_there(settings))


def champion_if_there(settings: PandaSettings) -> Version | None:
    """The same, asked once: for what is not worth waiting for an MLflow that is away."""
    return registry_of(settings).champion(model_name(settings.registered_model_name, settings.model))


def with_replay(settings: PandaSettings) -> PandaSettings:
    """The settings, with the champion's plan as `replay_of` where only a share of its records is wanted again.

    :raises PandaError: that plan is not on this machine.
    """
    if settings.replay_share == 1 or settings.replay_of:
        return settings
    champion = champion_of(settings)
    if champion is None:
        return settings
    plan = plan_of(champion, config_of(registry_of(settings), champion), Path(settings.cache_dir))
    if plan is None:
        raise PandaError(
            f"replay_share={settings.replay_share}: the plan of {champion.uri} is not here, so what it was trained on "
            "is not known; name its directory with replay_of, or use replay_share=1"
        )
    logger.info("%g of what %s was trained on is trained on again", settings.replay_share, champion.uri)
    return settings.model_copy(update={"replay_of": str(plan)})


def champion_directory(settings: PandaSettings) -> Path | None:
    """Weights and tokenizer of the champion; None when the base is wanted, or nobody is champion yet."""
    if settings.init_from != "champion":
        return None
    champion = champion_of(settings)
    if champion is None:
        name = model_name(settings.registered_model_name, settings.model)
        logger.info("%s has no champion yet: starting from the base model", name)
        return None
    folder = with_retries(lambda: registry_of(settings).files(champion, Path(settings.cache_dir)))
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"init_from=champion: {champion.uri} is an adapter, and training starts from whole weights; "
            "merge it into its base, or use init_from=base"
        )
    logger.info("starting from the champion %s", champion.uri)
    return folder
