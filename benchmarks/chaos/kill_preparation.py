"""SIGKILL of a data preparation at drawn moments, the same command again until it is done.

In: a seed. Out: a `Round`: every byte of the cache is that of a preparation undisturbed, what was complete before a
kill is still there, nothing is left over. Cost: two seconds of CPU a start.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.chaos.findings import Round
from benchmarks.chaos.victims import MARK, left_over
from data_prep import store
from data_prep.intact import VERIFIED
from tests.support.tokenizers import bytes_core, save

SCRIPT = """
import sys
from pathlib import Path
from data_prep.pipeline import prepare
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
if __name__ == "__main__":
    data, tokenizer, cache, workers = sys.argv[1:]
    corpus = CorpusSettings(
        instruction_tuning_data_dir=data, pretraining_data_dir=None, prepare_workers=int(workers),
        validation_fraction=0.1,
    )
    prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=128), Path(tokenizer), Path(cache))
"""
STAGES = ("records", "tokens", "plans")
FILES, RECORDS = 8, 3000


def kill_preparation(seed: int, ground: Path) -> Round:
    """Killed once in each stage."""
    draw, found = random.Random(seed), Round()
    data, tokenizer, whole = _undisturbed(ground)
    cache, mark, workers = ground / f"cache-{seed}", f"preparation-{seed}", draw.choice((1, 2))
    for stage in STAGES:
        before = _complete(cache)
        process = _start(data, tokenizer, cache, workers, mark)
        _wait_for(cache / stage, process)
        time.sleep(draw.uniform(0, 0.3))
        found.tried += process.poll() is None
        _kill(process)
        lost = before - _complete(cache)
        found.expect(not lost, "lost", f"{lost} was complete before the kill in {stage}")
        if left := left_over(mark):
            found.found("orphaned", f"killed in {stage}: {left}")
    if code := _start(data, tokenizer, cache, workers, mark).wait():
        found.found("lost", f"the same command again ended with {code}")
    compare(cache, whole, found)
    return found


def compare(cache: Path, whole: Path, found: Round) -> None:
    """Every byte of a cache beside that of a preparation undisturbed."""
    ours, expected = contents(cache), contents(whole)
    more = sorted(ours.keys() - expected.keys())
    found.expect(not more, "orphaned", f"left over: {more[:3]}")
    missing = expected.keys() - ours.keys()
    found.expect(not missing, "lost", f"missing: {sorted(missing)[:3]}")
    other = [name for name in expected.keys() & ours.keys() if ours[name] != expected[name]]
    found.expect(not other, "wrong", f"other bytes: {other[:3]}")


def write_corpus(data: Path, files: int, records: int) -> None:
    """So many files of so many short records."""
    data.mkdir()
    for number in range(files):
        made = ({"input": f"question {number} {i}", "target": f"answer {i} " * 12} for i in range(records))
        (data / f"{number:02}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))


def _undisturbed(ground: Path) -> tuple[Path, Path, Path]:
    """(corpus, tokenizer, cache of a whole preparation); made once."""
    data, tokenizer, whole = ground / "corpus", ground / "tokenizer-of-bytes", ground / "cache-whole"
    if not whole.exists():
        write_corpus(data, FILES, RECORDS)
        save(bytes_core(), tokenizer, bos_token="<s>")
        assert _start(data, tokenizer, whole, 1, "whole").wait() == 0
    return data, tokenizer, whole


def _start(data: Path, tokenizer: Path, cache: Path, workers: int, mark: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, *map(str, (data, tokenizer, cache, workers))]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, MARK: mark, "PYTHONPATH": root}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def _kill(process: subprocess.Popen) -> None:
    """The process alone: its workers have to notice by themselves."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def _wait_for(directory: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not (directory.exists() and any(directory.iterdir())) and process.poll() is None:
        assert time.monotonic() < deadline, f"nothing in {directory}"
        time.sleep(0.002)


def _complete(cache: Path) -> set[str]:
    return {str(path.parent) for path in cache.glob("*/*/manifest.json") if not path.parent.name.startswith(".")}


def contents(cache: Path) -> dict[str, str]:
    """File -> hash; what was verified already is noted by whoever finds something there."""
    files = [path for path in sorted(cache.rglob("*")) if path.is_file() and path != cache / VERIFIED]
    return {str(path.relative_to(cache)): store.hash_file(path) for path in files}
