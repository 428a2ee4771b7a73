"""Checkpoints written beside training: the copy of this rank's shard is all that a step waits for.

In: an engine, the progress, a directory that all ranks see. Out: ``step-000120/``, complete or not at all. Training
waits for the copy to the CPU (memory of one shard: trained weights and states, divided by the ranks); a thread of each
rank writes, hashes and fsyncs its own files:

    .step-000120-<token>/  state-00000-00000.safetensors   files of rank 0, at most 1 GiB each
                           state-00001-00000.safetensors   ... of rank 1
                           rank-00000.json                 sizes and hashes of a rank's files, written last
    then, by rank 0 alone, when every rank's list is there: complete.json, and the directory gets its name

The ranks tell each other through these lists, not by a collective: threads must not use the process group of training,
and the end of a step may be minutes away. A thread that fails makes its rank raise at the next micro-batch, and with it
the run ends. The next checkpoint, the end, and an error that ends the run wait for the last one.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import DiskError, disk_error
from data_prep.store import FileEntry, fsync, write_atomically
from training.distributed import Ranks
from training.engines.engine import Engine
from training.errors import CheckpointError
from training.launch import ownership
from training.launch.heartbeat import Heartbeat
from training.trainer import checkpoint, state_files
from training.trainer.checkpoint import Marker, Progress
from training.trainer.state_files import NamedPiece

FILE_BYTES = 1 << 30
LOOK_SECONDS = 0.05  # between two looks for the lists of other ranks
VISIBLE_SECONDS = 30.0  # a network file system may show a new directory late


class NotWritten(DiskError):
    """Another rank could not write its part of a checkpoint, and says why."""


@dataclass
class Writing:
    """One checkpoint on its way."""

    step: int
    directory: Path  # its temporary one
    final: Path
    began: float = field(default_factory=time.monotonic)
    stall_seconds: float = 0.0  # what training waited for
    error: Exception | None = None
    thread: threading.Thread | None = None
    given_up: threading.Event = field(default_factory=threading.Event)  # the run is ending, nobody else will come

    @property
    def under_way(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


@dataclass
class Saver:
    """Writes the checkpoints of a run, one at a time."""

    root: Path
    ranks: Ranks
    newest_step: int = 0  # of the newest complete checkpoint, 0 = there is none
    seconds: float | None = None  # that writing one takes here, as measured last
    writing: Writing | None = None

    def save(self, engine: Engine, progress: Progress, then: Callable[[Writing], None] = lambda writing: None) -> None:
        """Begin a checkpoint, unless this step has one; all ranks together.

        :param then: called by the thread of rank 0 when the checkpoint is complete
        """
        began = time.monotonic()
        if self.writing and self.writing.step == progress.step:
            return
        self.wait()
        if progress.step == self.newest_step:
            return
        directory = self._open_directory(progress.step)
        pieces = snapshot(engine)
        writing = Writing(progress.step, directory, self.root / checkpoint.name_of(progress.step), began)
        marker = checkpoint.marker(progress, self.ranks.world_size)
        writing.thread = threading.Thread(
            target=self._write, args=(writing, pieces, marker, then), name="checkpoint", daemon=True
        )
        writing.stall_seconds = writing.seconds
        self.writing = writing
        writing.thread.start()

    def check(self) -> None:
        """Raise what this rank's thread has met; looks at a field."""
        if self.writing and self.writing.error:
            self._fail(self.writing, self.writing.error)

    def wait(self) -> None:
        """Until the checkpoint under way is complete; all ranks together."""
        writing = self.writing
        if writing is None:
            return
        alive = Heartbeat("writing a checkpoint", 0, "seconds")
        under_way = True
        while under_way:
            if writing.thread:
                writing.thread.join(timeout=0.5 if writing.seconds > 1 else 0.02)
            num_failed, num_under_way = self.ranks.sum(float(writing.error is not None), float(writing.under_way))
            if num_failed:
                self._fail(writing, writing.error or NotWritten("another rank could not write its part"))
            under_way = num_under_way > 0
            alive(round(writing.seconds))
        self.seconds = self.ranks.max(self.seconds or 0.0 if self.ranks.is_first else 0.0)[0]
        self.newest_step, self.writing = writing.step, None

    def settle(self, seconds: float) -> None:
        """Give a checkpoint under way this long to become complete, before an error ends the run.

        Every rank for itself, by looking for what rank 0 writes: the others may be gone.
        """
        until, writing = time.monotonic() + seconds, self.writing
        while writing and not writing.error and time.monotonic() < until:
            if not writing.under_way and (writing.final / checkpoint.COMPLETE).is_file():
                return
            time.sleep(LOOK_SECONDS)

    def seconds_until(self, step: int) -> tuple[float, float]:
        """Until the checkpoint under way is complete, and until one of this step is, at the speed measured last.

        As rank 0 measures it; all ranks together. 0 where nothing is known yet.
        """
        whole = self.seconds or 0.0
        rest = max(whole - self.writing.seconds, 0.0) if self.writing and self.writing.under_way else 0.0
        newest = self.writing.step if self.writing else self.newest_step
        needed = rest if step == newest else rest + whole
        rest, needed = self.ranks.max(rest if self.ranks.is_first else 0.0, needed if self.ranks.is_first else 0.0)
        return rest, needed

    def _fail(self, writing: Writing, error: Exception) -> None:
        writing.given_up.set()
        what = f"{writing.final}: this checkpoint could not be written: "
        if isinstance(error, NotWritten):
            raise NotWritten(f"{what}{error}")
        told = disk_error(error, what) if isinstance(error, OSError) else None
        raise told or RuntimeError(f"{what}{error}") from error

    def _open_directory(self, step: int) -> Path:
        """A new temporary directory, of a name that no leftover has; made by rank 0, seen by all."""
        token = secrets.randbits(48) if self.ranks.is_first else 0
        if self.ranks.is_first:
            (self.root / temporary_name(step, token)).mkdir(parents=True)
        directory = self.root / temporary_name(step, int(self.ranks.max(float(token))[0]))
        wait_until_seen(directory, self.ranks)
        return directory

    def _write(
        self, writing: Writing, pieces: list[NamedPiece], marker: Marker, then: Callable[[Writing], None]
    ) -> None:
        """What the thread does; keeps what goes wrong for the main thread."""
        try:
            write_part(writing.directory, self.ranks.rank, pieces)
            if self.ranks.is_first and self._gather(writing, marker):
                ownership.check(self.root.parent)
                publish(writing.directory, writing.final, marker | {"seconds": writing.seconds})
                self.seconds = writing.seconds
                then(writing)
        except Exception as error:  # raised again by `check` and `wait`
            writing.error = error

    def _gather(self, writing: Writing, marker: Marker) -> bool:
        """Wait for the lists of all ranks and put them into the marker; False when the run ends before."""
        for rank in range(self.ranks.world_size):
            path = writing.directory / list_name(rank)
            while not path.is_file():
                if writing.given_up.wait(LOOK_SECONDS):
                    return False
            marker["files"] |= json.loads(path.read_text())
            path.unlink()
        checkpoint.check_sizes(writing.directory, marker["files"])
        return True


def wait_until_seen(directory: Path, ranks: Ranks) -> None:
    """Until this rank sees what rank 0 has made.

    :raises CheckpointError: it does not.
    """
    until = time.monotonic() + VISIBLE_SECONDS
    while not directory.is_dir():
        if time.monotonic() > until:
            raise CheckpointError(
                f"{directory}: rank {ranks.rank} does not see what rank 0 has made; output_dir has to lie on "
                "a file system that all machines share"
            )
        time.sleep(LOOK_SECONDS)


def temporary_name(step: int, token: int) -> str:
    return f".{checkpoint.name_of(step)}-{token:012x}"


def list_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def snapshot(engine: Engine) -> list[NamedPiece]:
    """This rank's pieces, copied to the CPU; the next step may change what they were copied from."""
    return [
        NamedPiece(name, key, piece.start, piece.shape, piece.value.detach().to("cpu", copy=True))
        for name, pieces in engine.read()
        for key, piece in pieces.items()
        if piece.value.numel()
    ]


def write_part(directory: Path, rank: int, pieces: list[NamedPiece]) -> None:
    """The files of a rank and, last, their list; lets go of the pieces as they are written."""
    files: dict[str, FileEntry] = {}
    while pieces:
        count, size = 0, 0
        while count < len(pieces) and (not size or size + pieces[count].value.nbytes <= FILE_BYTES):
            size += pieces[count].value.nbytes
            count += 1
        name = f"state-{rank:05d}-{len(files):05d}.safetensors"
        files[name] = state_files.write_pieces(directory / name, pieces[:count])
        del pieces[:count]
    write_atomically(directory / list_name(rank), json.dumps(files))


def publish(directory: Path, final: Path, marker: Marker) -> None:
    """The marker, then the name; what had the name before (a damaged one) goes after that."""
    marker = marker | {"xxh3": checkpoint.hash_of(marker)}
    (directory / checkpoint.COMPLETE).write_text(json.dumps(marker, indent=1))
    fsync(directory / checkpoint.COMPLETE)
    fsync(directory)
    if final.exists():
        final.rename(directory.with_name(f"{directory.name}-old"))
    directory.rename(final)
    fsync(final.parent)
