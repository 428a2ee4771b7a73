"""SIGKILL of a data preparation at drawn moments, the same command again until it is done.

In: a seed. Out: a `Round`: every byte of the cache is that of a preparation undisturbed, what was complete before a
kill is still there, nothing is left over. The same where the disk is full (a limit on the size of files), and where
three prepare the same at once. Cost: two seconds of CPU a start.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.chaos.findings import Round
from benchmarks.chaos.mutate import damaged
from benchmarks.chaos.victims import MARK, left_over
from data_prep import store
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
    inputs, whole = _undisturbed(ground)
    cache, mark, workers = ground / f"cache-{seed}", f"preparation-{seed}", draw.choice((1, 2))
    for stage in STAGES:
        before = _complete(cache)
        process = _start(inputs, cache, workers, mark)
        _wait_for(cache / stage, process)
        time.sleep(draw.uniform(0, 0.3))
        found.tried += process.poll() is None
        _kill(process)
        lost = before - _complete(cache)
        found.expect(not lost, "lost", f"{lost} was complete before the kill in {stage}")
        if left := left_over(mark):
            found.found("orphaned", f"killed in {stage}: {left}")
    if code := _start(inputs, cache, workers, mark).wait():
        found.found("lost", f"the same command again ended with {code}")
    _compare(found, cache, whole)
    return found


def fill_disk(seed: int, ground: Path) -> Round:
    """No file can grow beyond a drawn size; then there is room again."""
    draw, found = random.Random(seed), Round()
    inputs, whole = _undisturbed(ground)
    cache = ground / f"cache-full-{seed}"
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    for _ in range(3):
        room = int(largest * draw.random() ** 2)
        code = _start(inputs, cache, 1, "full", most_bytes=room).wait()
        found.tried += 1
        found.expect(code, "wrong", f"files were limited to {room} bytes, and it ended well")
        half = store.verify_cache(cache).damaged
        found.expect(not half, "wrong", f"half a directory counts as complete: {half}")
    if code := _start(inputs, cache, 1, "full").wait():
        found.found("lost", f"with room again it ended with {code}")
    _compare(found, cache, whole)
    return found


def together(seed: int, ground: Path) -> Round:
    """Three of the same preparation at once, with one worker or two."""
    draw, found = random.Random(seed), Round(tried=3)
    inputs, whole = _undisturbed(ground)
    cache = ground / f"cache-together-{seed}"
    processes = []
    for _ in range(3):
        processes.append(_start(inputs, cache, draw.choice((1, 2)), "together"))
        time.sleep(draw.uniform(0, 1))
    codes = [process.wait() for process in processes]
    found.expect(not any(codes), "lost", f"they ended with {codes}")
    _compare(found, cache, whole)
    return found


def damage(seed: int, ground: Path) -> Round:
    """A file of the cache is damaged: `verify` names it, what is discarded is made again to the same bytes."""
    draw, found = random.Random(seed), Round()
    inputs, whole = _undisturbed(ground)
    cache = ground / f"cache-damaged-{seed}"
    shutil.copytree(whole, cache)
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    chosen = draw.sample(files, min(10, len(files)))
    for path in chosen:
        before = path.read_bytes()
        path.write_bytes(damaged(draw, before))
        found.tried += 1
        if path.read_bytes() == before:
            continue
        verified = found.typed(f"verify, {path.name} damaged", lambda: store.verify_cache(cache))
        named = verified is not None and str(path.parent) in verified.damaged
        found.expect(named, "wrong", f"{path.name} is damaged, and verify does not name its directory")
    found.typed("discard", lambda: store.verify_cache(cache, discard_damaged=True))
    if code := _start(inputs, cache, 1, "damage").wait():
        found.found("lost", f"after --discard the preparation ended with {code}")
    _compare(found, cache, whole)
    return found


def _compare(found: Round, cache: Path, whole: Path) -> None:
    """Every byte is that of the preparation undisturbed; the cache goes."""
    ours, expected = contents(cache), contents(whole)
    more, missing = sorted(ours.keys() - expected.keys()), sorted(expected.keys() - ours.keys())
    found.expect(not more, "orphaned", f"left over: {more[:3]}")
    found.expect(not missing, "lost", f"missing: {missing[:3]}")
    other = [name for name in expected.keys() & ours.keys() if ours[name] != expected[name]]
    found.expect(not other, "wrong", f"other bytes: {other[:3]}")
    shutil.rmtree(cache)


def _undisturbed(ground: Path) -> tuple[tuple[Path, Path], Path]:
    """((corpus, tokenizer), cache of a whole preparation); made once."""
    inputs, whole = (ground / "corpus", ground / "tokenizer-of-bytes"), ground / "cache-whole"
    if not whole.exists():
        inputs[0].mkdir(parents=True)
        save(bytes_core(), inputs[1], bos_token="<s>")
        for number in range(FILES):
            records = ({"input": f"question {number} {i}", "target": f"answer {i} " * 12} for i in range(RECORDS))
            (inputs[0] / f"{number:02}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        assert _start(inputs, whole, 1, "whole").wait() == 0
    return inputs, whole


def _start(
    inputs: tuple[Path, Path], cache: Path, workers: int, mark: str, most_bytes: int | None = None
) -> subprocess.Popen:
    """The preparation as a process; `most_bytes`: no file of it gets larger."""
    command = [sys.executable, "-c", SCRIPT, *map(str, (*inputs, cache, workers))]
    if most_bytes is not None:
        command = ["prlimit", f"--fsize={most_bytes}", *command]
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
    """File -> hash."""
    return {str(path.relative_to(cache)): store.hash_file(path) for path in sorted(cache.rglob("*")) if path.is_file()}
