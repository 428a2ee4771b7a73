"""Data preparation against the tokenizer alone and against datasets + TRL and datatrove, as ratios in one run.

In: a real corpus to make a large one of (`benchmarks.corpus`), a tokenizer directory. Out: a table; every line says
what is compared, wall and CPU seconds, the ratios of both and the goal.

    python -m benchmarks.prepare --real CORPORA --tokenizer DIR --megabytes 100 --peers
    python -m benchmarks.prepare ... --short 400000     speed on so many short Chinese records, nothing else
    python -m benchmarks.prepare ... --only_growth      full, the same again, 1 % more; at 1x and 8x, by both engines
    python -m benchmarks.prepare ... --only_memory      peak memory at 1x and 8x
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import rows
from benchmarks.corpus import write_corpus, write_short_corpus
from data_prep.pipeline import prepare
from data_prep.plan.report import DataReport
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokenizer import load_tokenizer

LARGE = 8  # times the megabytes asked for
PEERS = {
    "trl": ("datasets + TRL", 8),
    "datatrove": ("datatrove", 5),
}  # what each is called, how much faster we mean to be


@dataclass
class Timing:
    """Seconds of wall clock and of all processors."""

    wall: float = 0.0
    cpu: float = 0.0


@contextmanager
def measured() -> Iterator[Timing]:
    """Times a block; the processes below this one are looked at every 50 ms, because not all are waited for."""
    timing = Timing()
    seen: dict[int, float] = {}
    stop = threading.Event()
    watcher = threading.Thread(target=_watch_cpu, args=(seen, stop))
    watcher.start()
    wall, before = time.perf_counter(), time.process_time()
    yield timing
    timing.wall, own = time.perf_counter() - wall, time.process_time() - before
    stop.set()
    watcher.join()
    timing.cpu = own + sum(seen.values())


def _watch_cpu(seen: dict[int, float], stop: threading.Event) -> None:
    started: dict[int, float] = {}
    while not stop.wait(0.05):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                first = started.setdefault(process.pid, 0.0 if seen else times.user + times.system)
                seen[process.pid] = times.user + times.system - first


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--real", type=Path, required=True, help="directory of real corpora to make the large one of")
    options.add_argument("--tokenizer", type=Path, required=True, help="tokenizer directory")
    options.add_argument("--megabytes", type=int, default=100)
    options.add_argument("--work", type=Path, default=Path("/tmp/panda-benchmark"))
    options.add_argument("--peers", action="store_true", help="also datasets + TRL and datatrove (minutes)")
    options.add_argument("--short", type=int, default=0, help="so many short Chinese records instead, for speed")
    options.add_argument("--only_growth", action="store_true", help="1 %% more data, at 1x and 8x, nothing else")
    options.add_argument("--only_memory", action="store_true", help="peak memory at 1x and 8x, nothing else")
    given = options.parse_args()
    if given.only_memory:
        memory(given)
    elif given.only_growth:
        growth(given)
    else:
        speed(given)


def speed(given: argparse.Namespace) -> None:
    """Seconds, and their ratios to those of the tokenizer alone."""
    data = short_corpus_of(given) if given.short else corpus_of(given, given.megabytes)
    base = encode_alone(data, given.tokenizer)
    full, report = prepared(data, given, "auto", "cache")
    kind = f"{given.short:,} short records" if given.short else f"{given.megabytes} MB"
    beside(f"prepare {kind}", full, "encode_batch_fast", base, at_most=0.25)
    print(f"   engines {report['engines']}")
    print(f"   stages {report['seconds']}, {report['records_in']:,} records, utilisation {report['utilisation']}")
    slow, report = prepared(data, given, "reference", "cache-reference")
    beside(f"prepare {kind}, tokenizers only", slow, "encode_batch_fast", base, at_most=1.10)
    print(f"   stages {report['seconds']}")
    if given.peers:
        peers(data, given)


def say(what: str, timing: Timing) -> None:
    """What others are compared with."""
    print(f"{what:<58} {timing.wall:8.2f} s wall {timing.cpu:8.2f} s cpu", flush=True)


def beside(what: str, ours: Timing, against: str, theirs: Timing, at_most: float | None = None) -> None:
    """A row of the table; both ratios, because on a busy machine that of the clock says little."""
    cpu_ratio = ours.cpu / theirs.cpu
    rows.say(rows.Row(what, ours.wall, against, theirs.wall, "s", at_most=at_most, cpu_ratio=cpu_ratio))


def corpus_of(given: argparse.Namespace, megabytes: int) -> Path:
    """The corpus of one size, made once."""
    directory = given.work / f"corpus-{megabytes}"
    if not (directory / "done").exists():
        shutil.rmtree(directory, ignore_errors=True)
        write_corpus(given.real, directory, megabytes)
        (directory / "done").touch()
    return directory


def short_corpus_of(given: argparse.Namespace) -> Path:
    """The corpus of short records, made once."""
    directory = given.work / f"short-{given.short}"
    if not (directory / "done").exists():
        shutil.rmtree(directory, ignore_errors=True)
        write_short_corpus(given.real, directory, given.short)
        (directory / "done").touch()
    return directory


def settings_of(data: Path) -> CorpusSettings:
    """Where the corpus is."""
    return CorpusSettings(
        instruction_tuning_data_dir=str(data / "instruction"), pretraining_data_dir=str(data / "pretraining")
    )


def texts_of(data: Path) -> Iterator[str]:
    """The texts that preparation encodes."""
    for path in sorted((data / "instruction").glob("*.json")):
        for record in json.loads(path.read_text(encoding="utf-8")):
            yield record["instruction"] + ("\n" + record["input"] if record["input"] else "")
            yield record["output"]
    for path in sorted((data / "instruction").glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield from json.loads(line).values()
    for path in sorted((data / "pretraining").glob("*.json")):
        for record in json.loads(path.read_text(encoding="utf-8")):
            yield record["title"] + "\n" + record["content"]
    for path in sorted((data / "pretraining").glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)


def encode_alone(data: Path, tokenizer: Path) -> Timing:
    """`tokenizers.encode_batch_fast` on all cores, ids thrown away: what everything else is compared with."""
    core = load_tokenizer(tokenizer).core
    texts = list(texts_of(data))
    tokens = 0
    with measured() as timing:
        for start in range(0, len(texts), 2000):
            for encoding in core.encode_batch_fast(texts[start : start + 2000], add_special_tokens=False):
                tokens += len(encoding)
    say(f"tokenizers.encode_batch_fast alone ({tokens:,} tokens)", timing)
    return timing


def prepared(
    data: Path, given: argparse.Namespace, engine: str, cache: str, fresh: bool = True
) -> tuple[Timing, DataReport]:
    """All of `data_prep` in this process and its workers: JSON in; ledger, shards and plan out."""
    if fresh:
        shutil.rmtree(given.work / cache, ignore_errors=True)
    tokenize = TokenizeSettings(tokenizer_engine=engine)
    with measured() as timing:
        result = prepare(settings_of(data), tokenize, PackSettings(), given.tokenizer, given.work / cache)
    return timing, result.report


def growth(given: argparse.Namespace) -> None:
    """The same corpus again, then with 1 % more in two new files. Part of the cost is fixed: so at two sizes."""
    small, large = given.megabytes, LARGE * given.megabytes
    for megabytes, engine in ((small, "auto"), (large, "auto"), (small, "reference")):
        data = corpus_of(given, megabytes)
        full, report = prepared(data, given, engine, "cache")
        by = "" if engine == "auto" else ", tokenizers only"
        say(f"{megabytes} MB, prepare ({', '.join(report['engines'])})", full)
        print(f"   stages {report['seconds']}, {report['records_in']:,} records")
        again, report = prepared(data, given, engine, "cache", fresh=False)
        beside(f"prepare {megabytes} MB again, nothing new{by}", again, "the first time", full)
        print(f"   stages {report['seconds']}")
        write_corpus(given.real, data, max(1, megabytes // 100), seed=1, name="new")
        more, report = prepared(data, given, engine, "cache", fresh=False)
        beside(f"prepare {megabytes} MB, 1 % more{by}", more, "the first time", full, at_most=0.05)
        print(f"   stages {report['seconds']}")
        for path in data.rglob("new.*"):
            path.unlink()


def peers(data: Path, given: argparse.Namespace) -> None:
    """The same data through other programs, each in a fresh process; ratios to ours in a fresh process too."""
    timings = {}
    for name in ("ours", "trl", "lines", "datatrove"):
        command = fresh_process(name, data, given)
        with measured() as timings[name]:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            print(f"{name}: failed (exit code {done.returncode}); is it installed?")
            continue
        if name == "lines":
            continue
        if name != "ours":
            against, faster = PEERS[name]
            beside(f"prepare {given.megabytes} MB", timings["ours"], against, timings[name], at_most=1 / faster)


def fresh_process(name: str, data: Path, given: argparse.Namespace) -> list[str]:
    """The command that runs one of `benchmarks.peers` from the beginning."""
    shutil.rmtree(given.work / "peer", ignore_errors=True)
    arguments = [name, str(data), str(given.tokenizer), str(given.work / "peer")]
    return [sys.executable, "-m", "benchmarks.peers", *arguments]


def memory(given: argparse.Namespace) -> None:
    """Peak memory at 1x and 8x, of its main process and of the largest of its workers."""
    held = {}
    for megabytes in (given.megabytes, LARGE * given.megabytes):
        data = corpus_of(given, megabytes)
        with subprocess.Popen(fresh_process("ours", data, given), stdout=subprocess.DEVNULL) as process:
            peaks = watch(psutil.Process(process.pid))
        main_process = peaks.pop(process.pid)
        largest = max(peaks.values(), key=lambda peak: peak.anonymous)
        print(f"{megabytes:5} MB: largest worker {largest}; main process {main_process}", flush=True)
        held[megabytes] = (largest.anonymous / 2**20, main_process.anonymous / 2**20)
    (small, few), (large, many) = held.values()
    for who, ours, theirs in (("worker", large, small), ("main process", many, few)):
        rows.say(rows.Row(f"memory of prepare, {who}, at {LARGE}x", ours, "at 1x", theirs, "MiB", at_most=1.25))


@dataclass
class Peak:
    """The most memory a process was seen to hold, in bytes. What is mapped from files is in the page cache, which the
    kernel takes back where memory is short; anonymous memory is what ends a process."""

    anonymous: int = 0
    mapped: int = 0

    def __str__(self) -> str:
        return f"{self.anonymous / 2**20:,.0f} MiB anonymous, {self.mapped / 2**20:,.0f} MiB of mapped files"


def watch(process: psutil.Process) -> dict[int, Peak]:
    """The peaks of a process and of each of its children, looked at every 20 ms until it ends."""
    peaks: dict[int, Peak] = {}
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                held = one.memory_info()
                peak = peaks.setdefault(one.pid, Peak())
                peak.anonymous = max(peak.anonymous, held.rss - held.shared)
                peak.mapped = max(peak.mapped, held.shared)
        time.sleep(0.02)
    return peaks


if __name__ == "__main__":
    main()
