"""Data preparation against the tokenizer alone and against datasets + TRL and datatrove, as ratios in one run.

In: a real corpus to make a large one of (`benchmarks.corpus`), a tokenizer directory. Out: a table; every line says
what is compared, wall and CPU seconds, the ratio of wall seconds and the goal.

    python -m benchmarks.prepare --real ../shared/data/real --tokenizer DIR --megabytes 100 --peers
"""

import argparse
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.corpus import write_corpus
from data_prep.prepare import prepare
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokenizer import load_tokenizer


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
    options.add_argument("--only_memory", action="store_true", help="peak memory at 1x and 8x, nothing else")
    given = options.parse_args()
    if given.only_memory:
        memory(given)
        return
    data = corpus_of(given, given.megabytes)
    shutil.rmtree(given.work / "cache", ignore_errors=True)
    base = encode_alone(data, given.tokenizer)
    ours(data, given, base)
    if given.peers:
        peers(data, given)


def say(what: str, timing: Timing, ratio: float | None = None, goal: str = "") -> None:
    """One line of the table."""
    shown = "" if ratio is None else f"{ratio:8.3f}"
    print(f"{what:<58} {timing.wall:8.2f} s wall {timing.cpu:8.2f} s cpu {shown:>9} {goal}", flush=True)


def corpus_of(given: argparse.Namespace, megabytes: int) -> Path:
    """The corpus of one size, made once."""
    directory = given.work / f"corpus-{megabytes}"
    if not (directory / "done").exists():
        shutil.rmtree(directory, ignore_errors=True)
        write_corpus(given.real, directory, megabytes)
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
    say(f"tokenizers.encode_batch_fast alone ({tokens:,} tokens)", timing, 1.0)
    return timing


def ours(data: Path, given: argparse.Namespace, base: Timing) -> None:
    """All of `data_prep`: JSON in; ledger, shards and plan out."""

    def run(engine: str, cache: str = "cache") -> Callable[[], dict]:
        tokenize, directory = TokenizeSettings(tokenizer_engine=engine), given.work / cache
        return lambda: prepare(settings_of(data), tokenize, PackSettings(), given.tokenizer, directory).report

    with measured() as full:
        report = run("auto")()
    say(f"prepare, fast engine ({report['engines']})", full, full.wall / base.wall, "goal <= 0.25")
    print(f"   stages {report['seconds']}, {report['records_in']:,} records, utilisation {report['utilisation']}")
    with measured() as again:
        run("auto")()
    say("the same again, nothing new", again, None, "goal < 3 s")
    write_corpus(given.real, data, max(1, given.megabytes // 100), seed=1, name="new")
    with measured() as more:
        report = run("auto")()
    say("1 % more data in two new files", more, more.wall / full.wall, "of the full time, goal < 0.05")
    print(f"   stages {report['seconds']}")
    for path in data.rglob("new.*"):
        path.unlink()
    shutil.rmtree(given.work / "cache-reference", ignore_errors=True)
    with measured() as slow:
        run("reference", "cache-reference")()
    say("prepare, tokenizers only", slow, slow.wall / base.wall, "goal <= 1.10")


def peers(data: Path, given: argparse.Namespace) -> None:
    """The same data through other programs, each in a fresh process; ratios to ours in a fresh process too."""
    timings = {}
    for name in ("ours", "trl", "lines", "datatrove"):
        shutil.rmtree(given.work / "peer", ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "benchmarks.peers",
            name,
            str(data),
            str(given.tokenizer),
            str(given.work / "peer"),
        ]
        with measured() as timings[name]:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            print(f"{name}: failed (exit code {done.returncode}); is it installed?")
            continue
        if name == "lines":
            continue
        goal = {"trl": "goal >= 8", "datatrove": "goal >= 5"}.get(name, "")
        say(f"{name}, in a process of its own", timings[name], timings[name].wall / timings["ours"].wall, goal)


def memory(given: argparse.Namespace) -> None:
    """Peak memory of the largest process at 1x and 8x."""
    for megabytes in (given.megabytes, 8 * given.megabytes):
        data = corpus_of(given, megabytes)
        shutil.rmtree(given.work / "peer", ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "benchmarks.peers",
            "ours",
            str(data),
            str(given.tokenizer),
            str(given.work / "peer"),
        ]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            peaks = watch(psutil.Process(process.pid))
        largest, main_process = max(peaks.values()) / 2**20, peaks[process.pid] / 2**20
        print(f"{megabytes:5} MB: largest process {largest:,.0f} MiB, main {main_process:,.0f} MiB", flush=True)


def watch(process: psutil.Process) -> dict[int, int]:
    """Largest unshared memory seen of a process and of each of its children, every 50 ms until it ends."""
    peaks: dict[int, int] = {}
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        for one in itertools.chain([process], process.children(recursive=True)):
            try:
                memory_info = one.memory_info()
            except psutil.NoSuchProcess:
                continue
            unshared = memory_info.rss - memory_info.shared  # mapped files are the page cache's
            peaks[one.pid] = max(peaks.get(one.pid, 0), unshared)
        time.sleep(0.05)
    return peaks


if __name__ == "__main__":
    main()
