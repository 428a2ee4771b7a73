"""Every benchmark after the other, and one page of them: `make bench`, `python -m benchmarks [--only NAME ...]`.

In: real corpora (`--real`), a pretrained checkpoint (`--checkpoint`, else the one that the slow tests use), and Pythons
of other trainers (`--peer NAME=PYTHON`; `benchmarks.train_peers` says how to make their environments), else their rows
are left out; nothing else may run. Out: docs/benchmarks.md, the table of all rows (`benchmarks.rows`) with machine,
versions, date and commands, and docs/images/benchmarks.png, the ratios beside their goals. A benchmark that fails is
named on the page and in the exit code. Cost: an hour of two cores, 4 GB of memory.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.rows import FILE, Row
from tests.support.smollm2 import smollm2

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
PICTURE = ROOT / "docs" / "images" / "benchmarks.png"
VERSIONS = ("torch", "transformers", "deepspeed", "tokenizers", "pyarrow", "datasets", "trl", "datatrove")
PREPARE = ("prepare", "--real", "{real}", "--tokenizer", "{checkpoint}")
STEP = ("--model-dir", "{checkpoint}", "--real", "{real}", "--layers", "6", "--length", "1024")
PEERS = ("llamafactory", "axolotl")
CASES = {
    "preparation": (*PREPARE, "--megabytes", "100", "--peers"),
    "short-records": (*PREPARE, "--short", "400000"),
    "growth": (*PREPARE, "--only_growth"),
    "memory-of-preparation": (*PREPARE, "--only_memory"),
    "memory-of-planning": ("plan_memory", "--records", "1000000", "4000000"),
    "packing": ("packing",),
    "start-up": ("start_up",),
    "step": ("train_step", "bare", *STEP),
    "step-of-trl": ("train_step", "trl", *STEP),
    **{f"step-of-{peer}": ("train_step", "peers", *STEP, "--peer", f"{peer}={{{peer}}}") for peer in PEERS},
    "checkpoint": ("checkpoint_stall",),
}
"""Name -> module of this folder and its arguments. 6 of 30 layers, so that a step on two cores takes seconds."""

PUBLISHED = """\
## On GPUs

Nothing here was measured on a GPU. What others have published is what ours will be compared with; `mfu` and tokens a
second a GPU are in the log, the report and MLflow of every run, and `make gpu-check ARGS='--model 7B'` makes a first
table in ten minutes.

| what | published | by |
|---|---|---|
| 7B, all weights, 8 x H100, 2,048 tokens | 10,643 tokens/s/GPU, 46.4 % MFU | llm-foundry, `scripts/train` |
| 7B, all weights, 8 x A100 80 GB, 2,048 tokens | 4,641 tokens/s/GPU, 64.2 % MFU | the same |
| 8B, all weights, 8 x H100, 8,192 tokens | 5,762 tokens/s/GPU; 6,667 compiled | torchtitan, `benchmarks/` |
| 8B, LoRA, 1 x H100, 4,096 tokens | 12,473 tokens/s | NeMo AutoModel, `performance-summary.mdx` |
| checkpoint of 7B | training waits 6.3 s instead of 148.8 s | pytorch.org, "Reducing checkpointing times" |
"""


@dataclass
class Result:
    """What a case has printed and how it ended."""

    command: str
    rows: list[Row]
    seconds: float
    returncode: int


def main() -> int:
    """Run what is asked for; write the page where that is all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", required=True, help="real corpora: DIR/instruction_tuning, DIR/pretraining")
    parser.add_argument("--checkpoint", type=Path, help="a pretrained checkpoint with its tokenizer [SmolLM2-135M]")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    given = parser.parse_args()
    places = {"real": given.real, "checkpoint": str(given.checkpoint or smollm2())}
    peers = dict(peer.partition("=")[::2] for peer in given.peer)
    if unknown := peers.keys() - set(PEERS):
        parser.error(f"--peer {', '.join(unknown)}: known are {', '.join(PEERS)}")
    places |= peers
    left_out = [f"step-of-{peer}" for peer in PEERS if peer not in places]
    results = {}
    for name in given.only:
        if name not in left_out:
            print(f"== {name}", flush=True)
            results[name] = run(CASES[name], places)
    failed = [name for name, result in results.items() if result.returncode]
    if given.only == list(CASES):
        PAGE.write_text(page(results), encoding="utf-8")
        draw([row for result in results.values() for row in result.rows if row.goal], PICTURE)
        print(f"written: {PAGE}, {PICTURE}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def run(words: Sequence[str], places: dict[str, str]) -> Result:
    """One benchmark in a process of its own."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as kept:
        began = time.monotonic()
        arguments = [word.format(**places) for word in words[1:]]
        command = [sys.executable, "-m", f"benchmarks.{words[0]}", *arguments]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, FILE: kept.name}, check=False).returncode
        rows = [Row(**json.loads(line)) for line in kept]
    general = {"real": "CORPORA", "checkpoint": "CHECKPOINT", **dict.fromkeys(PEERS, "PYTHON")}
    shown = [word.format(**general) for word in words[1:]]
    return Result(" ".join(["python -m", f"benchmarks.{words[0]}", *shown]), rows, time.monotonic() - began, code)


def page(results: dict[str, Result]) -> str:
    """The page, in Markdown. :param results: by name, of all cases but those whose peer is not there"""
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench`; no number here was written by hand. Each row is one run in which both sides took part,",
        "on the same machine; the ratio is ours : theirs. `of CPU` compares the seconds of all processors, which other",
        "load changes least; a goal is held against it where it is there.",
        "",
        machine(),
        "",
        "| what | ours | compared with | theirs | ratio | of CPU | goal |",
        "|---|---|---|---|---|---|---|",
        *(row_of(row) for result in results.values() for row in result.rows),
        "",
        "![Ratios beside their goals](images/benchmarks.png)",
        "",
    ]
    missed = [row for result in results.values() for row in result.rows if not row.met]
    if missed:
        lines += ["Goals missed: " + "; ".join(f"{row.what} against {row.against}" for row in missed) + ".", ""]
    failed = [name for name, result in results.items() if result.returncode]
    if failed:
        lines += [f"Failed: {', '.join(failed)}.", ""]
    left_out = [name for name in CASES if name not in results]
    if left_out:
        lines += [f"Left out: {', '.join(left_out)}. `benchmarks/train_peers.py` says how to have them.", ""]
    lines += ["## Commands", "", "| name | command | minutes |", "|---|---|---|"]
    lines += [f"| {name} | `{one.command}` | {one.seconds / 60:.1f} |" for name, one in results.items()]
    return "\n".join([*lines, "", PUBLISHED])


def row_of(row: Row) -> str:
    """A line of the table; a goal that is missed is said in words."""
    cpu = "" if row.cpu_ratio is None else f"{row.cpu_ratio:.3f}"
    goal = row.goal if row.met else f"{row.goal}, **missed**"
    values = f"{row.ours:,.4g} {row.unit} | {row.against} | {row.theirs:,.4g} {row.unit}"
    return f"| {row.what} | {values} | {row.ratio:.3f} | {cpu} | {goal} |"


def machine() -> str:
    """One paragraph: processors, memory, versions, date."""
    versions = []
    for name in VERSIONS:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 2**30
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {cores} cores of {processor()}, {memory:.0f} GiB, no GPU; "
        f"Python {platform.python_version()}; {', '.join(versions)}."
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def draw(rows: list[Row], path: Path) -> None:
    """Ratio and goal of every row on one logarithmic axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(rows) + 1.2), layout="constrained")
    places = range(len(rows), 0, -1)
    for place, row in zip(places, rows, strict=True):
        goal = row.at_most if row.at_most is not None else row.at_least
        assert goal is not None, "only rows with a goal are drawn"
        axes.plot([row.judged, goal], [place, place], color="#bbbbbb", linewidth=1, zorder=1)
        axes.plot(goal, place, "|", color="#555555", markersize=14, zorder=2)
        axes.plot(row.judged, place, "o", color="#2b7a4b" if row.met else "#b3261e", zorder=3)
    axes.axvline(1, color="#dddddd", zorder=0)
    axes.set_xscale("log")
    axes.set_ylim(0.3, len(rows) + 0.7)
    axes.set_yticks(list(places), [f"{row.what} : {row.against}" for row in rows], fontsize=8)
    axes.set_xlabel("ours : theirs; a bar marks the goal, green where it is met")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
