"""What can be known to be wrong before anything heavy is imported: all problems at once, in well under a second.

In: settings. Out: nothing, or a `ConfigError`. Looks at names of files; reads the config.json of the base model.
"""

import json
import os
from pathlib import Path

from configs.errors import ConfigError
from configs.settings import PandaSettings
from data_prep.errors import PandaError
from data_prep.places.address import is_address, require_readable
from data_prep.settings import FORMATS, SUFFIXES
from data_prep.targets import problems_of
from training.models.hub import (
    DELTA_MARKER,
    base_checkpoint,
    find_checkpoint,
    known_problem,
    named_delta,
    without_base,
)
from training.planning import compatibility
from training.settings import TrainSettings


def check(settings: PandaSettings, chosen: set[str]) -> None:
    """Raise one `ConfigError` with every problem.

    :param chosen: names the user gave a value for; a default corpus directory that is missing is fine when the other
        one is there, one that the user named is not.
    """
    problems = [*_corpus_problems(settings, chosen), *_output_problems(settings), *_training_problems(settings)]
    problems += [f"{name}: {problem}" for name, value in settings if isinstance(value, (dict, list))
                 for problem in problems_of(value)]  # fmt: skip
    problems += nothing_to_start_from(settings)
    if settings.replay_share < 1 and not settings.replay_of and settings.init_from != "champion":
        problems.append(
            f"replay_share={settings.replay_share}: the base model has not seen the old records; "
            "use init_from=champion, or name the plan of a training with replay_of"
        )
    if problems:
        raise ConfigError(problems)


def nothing_to_start_from(settings: PandaSettings) -> list[str]:
    """Neither weights nor the shape of new ones."""
    if base_checkpoint(settings) is not None or settings.architecture is not None:
        return []
    return [f"model={settings.model!r}: neither a checkpoint (ckpt_path) nor an architecture to start from"]


def _training_problems(settings: PandaSettings) -> list[str]:
    """A checkpoint that is not whole, settings that do not work together, a delta without its base."""
    checkpoint = base_checkpoint(settings)
    folder = find_checkpoint(checkpoint) if checkpoint else None
    config = folder / "config.json" if folder else None
    known = json.loads(config.read_text(encoding="utf-8")) if config and config.is_file() else {}
    model_config, rows = known if checkpoint else None, (settings.packing, settings.max_seq_length)
    problems = compatibility.problems(TrainSettings.of(settings), model_config, *rows)
    if checkpoint and (wrong := known_problem(checkpoint, needs_tokenizer=not named_delta(checkpoint))):
        problems.append(wrong)
    if (
        checkpoint
        and named_delta(checkpoint)
        and not settings.delta_base
        and not (folder and (folder / DELTA_MARKER).is_file())
    ):
        problems.append(without_base(checkpoint))
    return problems


def _corpus_problems(settings: PandaSettings, chosen: set[str]) -> list[str]:
    problems, usable = [], 0
    for name in ("instruction_tuning_data_dir", "pretraining_data_dir"):
        value = getattr(settings, name)
        if value is None:
            continue
        if is_address(value):  # what is there is asked when it is read
            usable += 1
            problems += [f"{name}: {problem}"] if (problem := _address_problem(value)) else []
        elif _has_corpus(Path(value), "" if settings.reader else SUFFIXES):
            usable += 1
        elif name in chosen:
            wanted = "file" if settings.reader else f"file of {', '.join(FORMATS)}"
            state = f"is empty (no {wanted} below it)" if Path(value).is_dir() else "does not exist"
            problems.append(f"{name}={value!r}: the directory {state}")
    if not usable and not problems:
        problems.append(
            "no corpus: neither ./dataset/instruction_tuning nor ./dataset/pretraining has a file of "
            f"{', '.join(FORMATS)}; "
            "put records there, or name your directories with --instruction_tuning_data_dir and --pretraining_data_dir"
        )
    return problems


def _address_problem(address: str) -> str | None:
    try:
        require_readable(address)
    except PandaError as error:
        return str(error)
    return None


def _has_corpus(folder: Path, suffixes: str | tuple[str, ...]) -> bool:
    """Whether a file of a corpus is below it; a user's reader takes any."""
    return any(
        name.endswith(suffixes) and not name.startswith(".") for _, _, files in os.walk(folder) for name in files
    )


def _output_problems(settings: PandaSettings) -> list[str]:
    problems = []
    for name in ("output_dir", "cache_dir"):
        folder = Path(getattr(settings, name)).absolute()
        parent = next(path for path in (folder, *folder.parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            problems.append(f"{name}={getattr(settings, name)!r}: cannot write there ({parent} is not writable)")
    return problems
