"""What the verbs about registered models share: their flags, and which registry and cache they mean.

In: argv of a verb. Out: `Verb` (positional words, switches, settings, registry). The flags are the settings themselves,
so a run and the verbs about it find the same MLflow and the same cache. Cost: MLflow's import, 2 to 4 s.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from configs.command import configure
from configs.flags import CONF_PATH, JSON, VERBOSE, Switch
from configs.settings import PandaSettings
from data_prep.errors import PandaError
from training.mlflow_sync import connect
from training.secrets import redact_text
from training.settings import TrackingSettings
from training.tracking import tracking_uri
from training.versions import Registry, RegistryError

SHOWN_CHARS = 160
FIELDS = {"output_dir", "cache_dir", "mlflow_tracking_uri"}


@dataclass(frozen=True)
class Verb:
    """A parsed command line of a verb about registered models."""

    words: list[str]
    switches: argparse.Namespace
    settings: PandaSettings
    registry: Registry

    @property
    def cache_dir(self) -> Path:
        return Path(self.settings.cache_dir)


def parse_verb(
    usage: str, text: str, argv: list[str], switches: tuple[Switch, ...] = (), fields: frozenset[str] = frozenset()
) -> Verb:
    """Read argv: the words in front, then flags. `usage` is such as ``panda promote VERSION``.

    :raises PandaError: another number of words than `usage` has; a word in brackets may be missing.
    """
    words = _words(argv)
    wanted = usage.split()[2:]
    if "-h" not in argv and "--help" not in argv:
        least = len([word for word in wanted if not word.startswith("[")])
        if not least <= len(words) <= len(wanted):
            raise PandaError(f"usage: {usage} [--flag value ...]")
    line, loaded = configure(usage, text, argv[len(words) :], [*switches, CONF_PATH, JSON, VERBOSE], FIELDS | fields)
    uri = tracking_uri(TrackingSettings.of(loaded.settings), Path(loaded.settings.output_dir))
    _check_there(uri)
    return Verb(words, line.switches, loaded.settings, Registry(uri))


def _check_there(uri: str) -> None:
    """MLflow would create a missing database, and answers for a missing server with a traceback."""
    other = "name another with --output_dir or --mlflow_tracking_uri"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise RegistryError(f"there is no registry at {uri} yet: a run makes it; {other}")
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        connect(uri).search_registered_models(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        reason = str(error).splitlines()[0][:SHOWN_CHARS]
        raise RegistryError(redact_text(f"MLflow at {uri} does not answer ({reason}); start it, or {other}")) from error


def _words(argv: list[str]) -> list[str]:
    """What stands before the first flag."""
    first_flag = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return argv[:first_flag]
