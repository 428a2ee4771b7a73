"""The spikes of a training, for people and for the next run.

In: the run directory after training. Out: the lines of RUN/spikes.jsonl, and the worst records that stood out in other
steps, shown in the Prefect UI; the records of spikes, in the file `quarantine`, when the run has come to its end: its
own plan is made anew when it goes on, and must stay what it was. Cost: two small files.
"""

from datetime import UTC, datetime
from pathlib import Path

from data_prep.plan import tombstones
from tasks.reporting import show_spikes
from training import run_files
from training.run_files import Culprit, Spike
from training.tracking.run_record import new_lines

MOST_SHOWN = 20


def spikes_of(run_dir: Path) -> list[Spike]:
    """What training has found, in the order of the steps."""
    return [Spike(**line) for line in new_lines(run_dir / run_files.SPIKES, 0)[1]]  # type: ignore[typeddict-item]  # JSON as training wrote it


def standing_out(run_dir: Path) -> list[Culprit]:
    """The worst of the records that stood out in a step that was no spike; each once, whatever the number of epochs."""
    lines = new_lines(run_dir / run_files.STANDING_OUT, 0)[1]
    records = [Culprit(**one) for line in lines for one in line["records"]]  # type: ignore[typeddict-item]  # JSON as training wrote it
    worst = {(one["file"], one["line"]): one for one in sorted(records, key=lambda one: one["loss"])}
    return sorted(worst.values(), key=lambda one: -one["loss"])[:MOST_SHOWN]


def show(run_dir: Path) -> tuple[list[Spike], list[Culprit]]:
    """The spikes, and the records that stood out without one; also as an artifact where there are some."""
    spikes, others = spikes_of(run_dir), standing_out(run_dir)
    if spikes or others:
        show_spikes(spikes, others)
    return spikes, others


def put_into_quarantine(run_dir: Path, quarantine: str | None) -> int:
    """Write the records down that made a spike in which training made no update; how many were not there before."""
    if quarantine is None:
        return 0
    now = datetime.now(UTC).isoformat(timespec="seconds")
    named = {
        one["hash"]: {
            "hash": one["hash"],
            "record": f"{one['file']}:{one['line']}",
            "time": now,
            "note": f"{run_dir.name}, step {spike['step']}: loss {one['loss']:.2f}; {spike['says']}",
        }
        for spike in spikes_of(run_dir)
        if spike["done"] != "warned"
        for one in spike["records"]
    }
    return len(tombstones.append(Path(quarantine), named.values())) if named else 0
