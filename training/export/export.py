"""Export: a model directory that transformers, vLLM and others read, from full weights or from an adapter and its base.

In: a model directory (of a run or of the registry), prompts to compare on. Out: a directory with safetensors,
tokenizer, generation config, chat template and `README.md`, renamed into place when all of it is right; a merged model
is refused when it does not say what the adapter says. Cost: reading and writing the weights, two passes over the
prompts.
"""

import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import PandaError
from training.export.merge import merge
from training.export.parity import Difference, Tuned, difference
from training.models.hub import base_of, resolve_checkpoint
from training.models.transformers4 import write_for_transformers4
from training.tracking.looks import only_a_look

log = logging.getLogger(__name__)

MAX_MEAN_KL = 1e-3  # nats; rounding to bfloat16 costs about 1e-4
MIN_TOP1_AGREEMENT = 0.98
CONVERTER = "convert_hf_to_gguf.py"

WEIGHT_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


class ExportError(PandaError):
    """The model cannot be exported, or what came out is not the same model."""


@dataclass(frozen=True)
class Exported:
    """What was written, and for an adapter how well it was merged."""

    path: str
    kind: str  # full weights: "copied"; adapter: merged "streamed" or "in memory"
    base_model: str | None = None
    difference: Difference | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class Source:
    """What is exported, and the prompts to compare on. `base`: of an adapter, where it has moved."""

    model_dir: Path
    prompts: list[list[int]]
    base: Path | None = None
    trust_remote_code: bool = False


def export(source: Source, target: Path, card: Callable[[Exported], str]) -> Exported:
    """Write `target`, which must not exist; `card` writes the README from what came out."""
    if target.exists():
        raise ExportError(f"{target} is there already; choose another directory or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as directory:
        unfinished = Path(directory) / "model"
        unfinished.mkdir()
        done = _fill(unfinished, source)
        done = Exported(str(target), done.kind, done.base_model, done.difference)
        with only_a_look("the model card"):
            (unfinished / "README.md").write_text(card(done), encoding="utf-8")
        unfinished.rename(target)
    return done


def _fill(unfinished: Path, source: Source) -> Exported:
    model_dir, reference = source.model_dir, base_of(source.model_dir)
    if reference is None:
        log.info("copying %s", model_dir)
        shutil.copytree(model_dir, unfinished, dirs_exist_ok=True)  # no links: what is exported may be edited
        write_for_transformers4(unfinished)
        return Exported(str(unfinished), "copied")
    base_dir = source.base or find_base(reference)
    how = merge(model_dir, base_dir, unfinished, source.trust_remote_code)
    copy_companions(model_dir, base_dir, unfinished)
    write_for_transformers4(unfinished)
    found = difference(unfinished, Tuned(model_dir, base_dir, source.trust_remote_code), source.prompts)
    if found.mean_kl > MAX_MEAN_KL or found.top1_agreement < MIN_TOP1_AGREEMENT:
        raise ExportError(
            f"merging {model_dir} into {base_dir} gives another model: mean KL {found.mean_kl:.2e} "
            f"(allowed {MAX_MEAN_KL:.0e}), the same next token at {found.top1_agreement:.1%} of {found.num_positions} "
            f"positions (needed {MIN_TOP1_AGREEMENT:.0%}); deploy the adapter beside its base instead"
        )
    return Exported(str(unfinished), how, str(base_dir), found)


def find_base(reference: str) -> Path:
    """The directory of the base an adapter refers to."""
    path = Path(reference)
    return path if path.is_dir() else resolve_checkpoint(reference)


def copy_companions(model_dir: Path, base_dir: Path, target: Path) -> None:
    """Everything beside the weights: the model's own files first, then what only the base has (licence, code)."""
    for path in sorted(model_dir.iterdir()):
        if path.is_file() and path.name not in WEIGHT_FILES and path.name != "config.json":
            shutil.copyfile(path, target / path.name)
    for path in [base_dir / "generation_config.json", *base_dir.glob("LICENSE*"), *base_dir.glob("*.py")]:
        if path.is_file() and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def to_gguf(model_dir: Path) -> Path:
    """A GGUF file beside the weights, through llama.cpp's own converter, which must be on PATH."""
    converter = shutil.which(CONVERTER)
    if not converter:
        raise ExportError(f"GGUF needs {CONVERTER} of llama.cpp on PATH; the export in {model_dir} is complete without")
    output = model_dir / "model.gguf"
    command = [sys.executable, converter, str(model_dir), "--outfile", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"{CONVERTER} failed on {model_dir}:\n{done.stderr.strip()[-2000:]}")
    return output
