"""Where the weights come from: a directory, a folder below ./pretrained-models, or a hub id that is downloaded.

In: the name the user gave. Out: a local directory with config.json, safetensors weights and a tokenizer, or a
`CheckpointError` that says what is missing. Cost: a few stat calls; for a hub id the download, once (Hugging Face's
cache). No weights are read and torch is not imported. Pickled weights (.bin) are never loaded: they run code.
"""

import json
import re
from pathlib import Path

from training.errors import CheckpointError
from training.settings import ModelSettings

PRETRAINED = Path("pretrained-models")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
WEIGHTS = ["*.safetensors"]
DESCRIPTION = ["*.json", "*.jinja", "*.py", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
NOT_DOWNLOADED = ["original/*", "consolidated*", "onnx/*", "*.onnx_data"]
"""The publisher's own format beside the Hugging Face one, which would double the download."""
ADAPTER = "adapter_config.json"
DELTA_MARKER = "delta.json"
DELTA_NAME = re.compile(r"(^|[-_.])delta([-_.]|$)", re.IGNORECASE)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
CONVERSION = (
    'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    "M.from_pretrained('{name}').save_pretrained('{folder}'); T.from_pretrained('{name}').save_pretrained('{folder}')\""
)


def base_checkpoint(settings: ModelSettings) -> str | None:
    """What the model starts from: `ckpt_path`, else `model` if that is a path or hub id; None = from scratch."""
    if settings.ckpt_path is not None:
        return settings.ckpt_path
    model = settings.model
    named = "/" in model or Path(model).is_dir() or (PRETRAINED / model).is_dir()
    return model if named else None


def named_delta(checkpoint: str) -> bool:
    """Whether a checkpoint's name says that it is a delta."""
    return bool(DELTA_NAME.search(Path(checkpoint).name))


def without_base(checkpoint: str) -> str:
    """What to say about a delta whose base nobody named."""
    return (
        f"ckpt_path={checkpoint!r} is a delta (weights minus a base); name its base with --delta_base, "
        "or rename the directory without the word delta if it holds whole weights"
    )


def resolve_checkpoint(ckpt_path: str, needs_tokenizer: bool = True) -> Path:
    """The local directory of a checkpoint, complete enough to start from; a hub id is downloaded first."""
    folder = find_checkpoint(ckpt_path) or _download(ckpt_path)
    if problem := missing_part(folder, ckpt_path, needs_tokenizer):
        raise CheckpointError(problem)
    return folder


def known_problem(ckpt_path: str, needs_tokenizer: bool = True) -> str | None:
    """What is wrong with a checkpoint as far as this machine can tell without the hub; None when nothing is."""
    folder = find_checkpoint(ckpt_path)
    if folder is None:
        return None if HUB_ID.match(ckpt_path) else _neither(ckpt_path)
    return missing_part(folder, ckpt_path, needs_tokenizer)


def description(settings: ModelSettings) -> Path | None:
    """A directory with config and tokenizer of what training starts from; None from scratch, or out of reach.

    No weights are downloaded for it. A delta without a tokenizer has that of its base.
    """
    checkpoint = base_checkpoint(settings)
    folder = resolve_description(checkpoint) if checkpoint else None
    if checkpoint and named_delta(checkpoint) and settings.delta_base and not (folder and has_tokenizer(folder)):
        return resolve_description(settings.delta_base)
    return folder


def has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def resolve_description(ckpt_path: str) -> Path | None:
    """A directory with the config and the tokenizer of a checkpoint, but perhaps no weights; None if out of reach."""
    try:
        return find_checkpoint(ckpt_path) or _download(ckpt_path, DESCRIPTION)
    except CheckpointError:
        return None


def find_checkpoint(ckpt_path: str) -> Path | None:
    """The directory `ckpt_path` names, itself or below ./pretrained-models; None when there is no such directory."""
    places = (Path(ckpt_path).expanduser(), PRETRAINED / ckpt_path)
    return next((place.absolute() for place in places if place.is_dir()), None)


def missing_part(folder: Path, name: str, needs_tokenizer: bool) -> str | None:
    """What the directory of the checkpoint `name` lacks, with the remedy; None when it has all."""
    if not (folder / "config.json").is_file():
        lacks = "there is no config.json; a checkpoint in Hugging Face format is needed"
    elif not any(folder.glob("*.safetensors")):
        lacks = _no_weights(name)
    elif needs_tokenizer and not has_tokenizer(folder):
        lacks = f"there is no tokenizer (one of {', '.join(TOKENIZER_FILES)}); copy the model's tokenizer files there"
    else:
        return None
    return f"ckpt_path={name!r}: {lacks} (looked in {folder})"


def _no_weights(name: str) -> str:
    target = PRETRAINED / f"{Path(name).name}-safetensors"
    return (
        "there are no .safetensors weights. Pickled weights (.bin, .pth) run code when they are loaded and are "
        "refused; if you trust their publisher, convert them once: "
        f"{CONVERSION.format(name=name, folder=target)} and give --ckpt_path {target.name}"
    )


def _download(ckpt_path: str, patterns: list[str] | None = None) -> Path:
    """The directory of a hub id in Hugging Face's cache; only what is missing there is downloaded."""
    if not HUB_ID.match(ckpt_path):
        raise CheckpointError(_neither(ckpt_path))
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                ckpt_path, allow_patterns=patterns or [*WEIGHTS, *DESCRIPTION], ignore_patterns=NOT_DOWNLOADED
            )
        )
    except errors.GatedRepoError:
        reason = f"the hub wants a licence accepted: open https://huggingface.co/{ckpt_path}, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such public model (a private one needs `hf auth login`)"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = (
            "the hub cannot be reached from here and its cache has no copy; download the model where there is "
            f"network (`hf download {ckpt_path}`) and copy it to ./{PRETRAINED}/{Path(ckpt_path).name}"
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = f"the download failed: {' '.join(str(error).split())[:300]}"
    raise CheckpointError(f"{_looked_at(ckpt_path)}; as a hub id: {reason}")


def _neither(ckpt_path: str) -> str:
    return f"{_looked_at(ckpt_path)}; not a hub id (owner/name) either"


def _looked_at(ckpt_path: str) -> str:
    places = dict.fromkeys(str(path.absolute()) for path in (Path(ckpt_path), PRETRAINED / ckpt_path))
    return f"ckpt_path={ckpt_path!r}: no directory {', none '.join(places)}"


def base_of(model_dir: Path) -> str | None:
    """What an adapter is an adapter of (directory or hub id); None for full weights."""
    path = model_dir / ADAPTER
    return json.loads(path.read_text())["base_model_name_or_path"] if path.exists() else None
