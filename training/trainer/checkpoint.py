"""Checkpoints: what is needed to resume, independent of the number of ranks and of the engine.

On disk, below ``RUN/checkpoints``::

    step-000120/  state-00000.safetensors ...   "<parameter>|weight", "<parameter>|exp_avg", ... whole, float32
                  complete.json                 step, progress, sizes and hashes of the files; written last

Only trained parameters are in it, so a LoRA checkpoint holds no base weights. Written to a temporary name, fsynced,
then renamed; a directory without a valid `complete.json` is not a checkpoint. The newest valid one is resumed, a
damaged one is skipped with a warning, and old ones are deleted only after a newer one is complete. No pickle is read
or written.

Random numbers are not in it: every micro-batch seeds dropout from (seed, step, rows), see `step.py`.

Cost: every trained parameter is gathered once and written by rank 0, in files of at most 1 GiB (so that is the memory
it takes); 12 bytes a trained parameter with AdamW. One writer is slower than one per rank on a large cluster, but N
ranks resume on M and ZeRO resumes on FSDP without a conversion.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_prep.store import fsync, hash_file
from training.distributed import Ranks
from training.engines.engine import Engine
from training.errors import CheckpointError
from training.launch.heartbeat import Heartbeat

FORMAT_VERSION = 1
COMPLETE = "complete.json"
FILE_BYTES = 1 << 30
SEPARATOR = "|"

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is: everything that is not a tensor."""

    step: int = 0  # optimizer steps done
    rows_per_step: int = 0
    target_tokens: int = 0  # trained so far
    tokens: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_before: dict = field(default_factory=dict)
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0

    def add(self, loss: float, tokens: int, target_tokens: int, seconds: float) -> None:
        """One more step is done."""
        self.step += 1
        self.tokens += tokens
        self.target_tokens += target_tokens
        self.seconds += seconds
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def save(engine: Engine, progress: Progress, root: Path, ranks: Ranks) -> Path:
    """Write a checkpoint; all ranks together, rank 0 writes. One that is there already and whole is kept."""
    final = root / name_of(progress.step)
    exists = ranks.max(float(ranks.is_first and is_complete(final)))[0]
    if not exists:
        temporary = root / f".{final.name}-{os.getpid()}"
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        _write_states(engine, temporary if ranks.is_first else None)
        if ranks.is_first:
            _finish(temporary, final, progress)
    ranks.barrier()
    return final


def _write_states(engine: Engine, directory: Path | None) -> None:
    """Gather one parameter at a time; rank 0 (which has a directory) writes a file whenever 1 GiB is together."""
    tensors: dict[str, Tensor] = {}
    number, size = 0, 0
    alive = Heartbeat("writing a checkpoint", len(engine.trained()), "tensors")
    for done, (name, state) in enumerate(engine.read()):
        alive(done)
        if directory is None:
            continue
        tensors |= {f"{name}{SEPARATOR}{key}": value.contiguous().clone() for key, value in state.items()}
        size += sum(value.nbytes for value in state.values())
        if size >= FILE_BYTES:
            _write_file(tensors, directory, number)
            tensors, number, size = {}, number + 1, 0
    if directory is not None and tensors:
        _write_file(tensors, directory, number)


def _write_file(tensors: dict[str, Tensor], directory: Path, number: int) -> None:
    path = directory / f"state-{number:05d}.safetensors"
    save_file(tensors, path)
    fsync(path)


def _finish(temporary: Path, final: Path, progress: Progress) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "xxh3": hash_file(path)} for path in sorted(temporary.iterdir())}
    marker = {"format_version": FORMAT_VERSION, "progress": asdict(progress), "files": files}
    (temporary / COMPLETE).write_text(json.dumps(marker, indent=1))
    fsync(temporary / COMPLETE)
    fsync(temporary)
    if final.exists():  # incomplete or damaged: `save` keeps a whole one
        shutil.rmtree(final)
    temporary.rename(final)
    fsync(final.parent)


def is_complete(directory: Path) -> bool:
    """True when the marker is there and every file has its size and hash; says what is wrong otherwise."""
    marker = directory / COMPLETE
    if not marker.is_file():
        return False
    try:
        content = json.loads(marker.read_text())
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {content['format_version']}, this program reads {FORMAT_VERSION}")
        for name, expected in content["files"].items():
            file = directory / name
            if file.stat().st_size != expected["bytes"] or hash_file(file) != expected["xxh3"]:
                raise ValueError(f"{name} is damaged")
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: skipped, not a whole checkpoint (%s)", directory, error)
        return False
    return True


def newest(root: Path) -> Path | None:
    """The newest checkpoint that is whole, or None."""
    return next((path for path in sorted(root.glob("step-*"), reverse=True) if is_complete(path)), None)


def newest_of_all(root: Path, ranks: Ranks) -> Path | None:
    """The newest whole checkpoint, as rank 0 sees it; the others wait and take its word."""
    found = newest(root) if ranks.is_first else None
    step = ranks.max(float(read_progress(found).step) if found else -1.0)[0]
    return root / name_of(int(step)) if step >= 0 else None


def read_progress(directory: Path) -> Progress:
    return Progress(**json.loads((directory / COMPLETE).read_text())["progress"])


def load(engine: Engine, directory: Path) -> None:
    """Put a checkpoint into the engine; every rank reads the files and keeps its shard."""
    expected = set(engine.trained())
    alive = Heartbeat("reading a checkpoint", len(expected), "tensors")
    for done, (name, state) in enumerate(_read_states(directory)):
        alive(done)
        if name not in expected:
            raise CheckpointError(
                f"{directory}: holds {name}, which is not trained now; resume with the settings the run began with"
            )
        expected.discard(name)
        engine.write(name, state)
    if expected:
        raise CheckpointError(f"{directory}: lacks {len(expected)} trained parameters, first {sorted(expected)[0]}")


def _read_states(directory: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(parameter, its states); the states of one parameter lie in one file."""
    for file in sorted(directory.glob("state-*.safetensors")):
        with safe_open(file, "pt") as tensors:
            keys: dict[str, list[str]] = {}
            for entry in tensors.keys():  # noqa: SIM118  # not a mapping
                name, key = entry.rsplit(SEPARATOR, 1)
                keys.setdefault(name, []).append(key)
            for name, found in keys.items():
                yield name, {key: tensors.get_tensor(f"{name}{SEPARATOR}{key}") for key in found}


def prune(root: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best one, and what killed writers left behind."""
    complete = [path for path in sorted(root.glob("step-*")) if (path / COMPLETE).is_file()]
    keep = {path.name for path in complete[-keep_last:]} | ({name_of(best_step)} if best_step is not None else set())
    for path in [*complete, *root.glob(".step-*")]:
        if path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)


def discard_after(root: Path, step: int) -> None:
    """Delete checkpoints of later steps than the one resumed: they are damaged, and would push out good ones."""
    for path in root.glob("step-*"):
        if path.name > name_of(step):
            log.warning("%s: deleted, the run goes on from step %d", path, step)
            shutil.rmtree(path, ignore_errors=True)


def check_disk(root: Path, needed: int) -> None:
    """Refuse to start a run whose checkpoints do not fit."""
    free = shutil.disk_usage(root).free
    if needed > free:
        raise CheckpointError(
            f"{root}: checkpoints and model need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free space, lower keep_last, or choose another output_dir"
        )
