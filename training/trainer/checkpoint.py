"""Checkpoints: what is needed to resume, independent of the number of ranks and of the engine.

On disk, below ``RUN/checkpoints``::

    step-000120/  state-00000-00000.safetensors ...  pieces of "<parameter>|weight", "<parameter>|exp_avg", ...:
                                                     those of rank 0; state-00001-... are those of rank 1
                  complete.json                      step, progress, sizes and hashes of the files, and a
                                                     hash of all that; written last

Only trained parameters are in it, so a LoRA checkpoint holds no base weights. `saver.py` writes it, beside training;
`state_files.py` has the files' format. A directory without a valid `complete.json` is not a checkpoint. The newest
valid one is resumed, a damaged one is skipped with a warning, and old ones are deleted only after a newer one is
complete. No pickle is read or written. Format 1, whole tensors written by one rank, is read as well.

Random numbers are not in it: every micro-batch seeds dropout from (seed, step, rows), see `step.py`.

Cost: 12 bytes a trained parameter with AdamW. On resume each rank hashes a part of the files, and reads the ranges
that its shard needs: N ranks resume on M and ZeRO resumes on FSDP without a conversion.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import xxhash

from data_prep.store import FileEntry, hash_file
from training.distributed import Ranks
from training.engines.engine import Engine
from training.errors import CheckpointError
from training.launch.heartbeat import Heartbeat
from training.run_files import HeldOut
from training.trainer.spikes import WINDOW, Histogram
from training.trainer.state_files import read_index

FORMAT_VERSION = 2
READABLE = (1, 2)
COMPLETE = "complete.json"

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
    eval_before: HeldOut = field(default_factory=dict)
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    spikes: int = 0
    steps_without_update: int = 0  # of `step`: passed over because of a spike, or gone back behind
    stopped: str = ""  # why training has ended before all its steps were done
    recent: list[tuple[float, float]] = field(default_factory=list)  # (loss, gradient norm): what limits follow from
    segments: Histogram = field(default_factory=list)  # and what segments are compared with

    def add(self, loss: float, grad_norm: float, tokens: int, target_tokens: int, seconds: float) -> None:
        """One more step is done."""
        self.step += 1
        self.tokens += tokens
        self.target_tokens += target_tokens
        self.seconds += seconds
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss
        self.recent = [*self.recent, (loss, grad_norm)][-WINDOW:]


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def step_of(directory: Path) -> int:
    """Steps of the checkpoint in a directory of this name."""
    return int(directory.name.rpartition("-")[2])


class Marker(TypedDict):
    """complete.json."""

    format_version: int
    progress: dict[str, Any]  # the fields of `Progress`; older ones have fewer
    ranks: int
    files: dict[str, FileEntry]
    seconds: NotRequired[float]  # that the writing took
    xxh3: NotRequired[str]  # of all the rest; absent in the first ones


def marker(progress: Progress, num_ranks: int) -> Marker:
    """What `complete.json` says, without the files."""
    return {"format_version": FORMAT_VERSION, "progress": asdict(progress), "ranks": num_ranks, "files": {}}


def hash_of(content: Marker) -> str:
    """Of all fields of `complete.json` but the hash: a flipped bit in it would be another step."""
    known = {name: value for name, value in content.items() if name != "xxh3"}
    return xxhash.xxh3_128_hexdigest(json.dumps(known, sort_keys=True).encode())


def read_marker(directory: Path) -> Marker | None:
    """What `complete.json` says of files that have their sizes; None where it is not there, or with a warning."""
    if not (directory / COMPLETE).is_file():
        return None
    try:
        content = json.loads((directory / COMPLETE).read_text())
        if content["format_version"] not in READABLE:
            raise ValueError(f"format version {content['format_version']}, this program reads up to {FORMAT_VERSION}")
        if content.get("xxh3", hash_of(content)) != hash_of(content):
            raise ValueError(f"{COMPLETE} is damaged: its hash differs")
        check_sizes(directory, content["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s: skipped, not a whole checkpoint (%s)", directory, error)
        return None
    return content


def check_sizes(directory: Path, files: dict[str, FileEntry]) -> None:
    """:raises OSError, ValueError: a file is missing or of another size."""
    for name, expected in files.items():
        size = (directory / name).stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{name} is damaged: {size} bytes instead of {expected['bytes']}")


def newest(root: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint that is whole, or None. All ranks together: each hashes a part of the files."""
    steps = sorted((step_of(path) for path in root.glob("step-*")), reverse=True) if ranks.is_first else []
    for step in _as_first_sees(steps, ranks):
        if _is_whole(root / name_of(step), ranks):
            return root / name_of(step)
    return None


def _as_first_sees(steps: list[int], ranks: Ranks) -> Iterator[int]:
    """The steps that rank 0 has listed, one by one; the others take its word."""
    remaining = iter(steps)
    while (step := int(ranks.max(float(next(remaining, -1)))[0])) >= 0:
        yield step


def _is_whole(directory: Path, ranks: Ranks) -> bool:
    """True when the marker is there and every file has its size and hash; says what is wrong otherwise."""
    content = read_marker(directory)
    files = list((content or {"files": {}})["files"].items())[ranks.rank :: ranks.world_size]
    alive = Heartbeat("checking a checkpoint", len(files), "files")
    damaged = content is None
    for done, (name, expected) in enumerate(files):
        alive(done)
        if hash_file(directory / name) != expected["xxh3"]:
            log.warning("%s: skipped, not a whole checkpoint (%s is damaged)", directory, name)
            damaged = True
    return not ranks.max(float(damaged))[0]


def read_progress(directory: Path) -> Progress:
    return Progress(**json.loads((directory / COMPLETE).read_text())["progress"])


def seconds_of(directory: Path) -> float | None:
    """How long a checkpoint took to be written; format 1 does not say."""
    return json.loads((directory / COMPLETE).read_text()).get("seconds")


def load(engine: Engine, directory: Path) -> None:
    """Put a checkpoint into the engine; every rank reads the ranges that its shard needs."""
    stored, expected = read_index(directory), engine.trained()
    if unknown := sorted(stored.keys() - set(expected)):
        raise CheckpointError(
            f"{directory}: holds {unknown[0]}, which is not trained now; resume with the settings the run began with"
        )
    if missing := sorted(set(expected) - stored.keys()):
        raise CheckpointError(f"{directory}: lacks {len(missing)} trained parameters, first {missing[0]}")
    alive = Heartbeat("reading a checkpoint", len(expected), "tensors")
    for done, name in enumerate(expected):
        alive(done)
        engine.write(name, stored[name])


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
