"""Fuzzing: the readers of `readers.py` fed with damaged, mutated and grown inputs until the time is up.

In: a seed, seconds. Out: findings, each with the input that shows it. With atheris (`make chaos` installs it) the
inputs are grown by coverage: libFuzzer keeps those that reach new branches of this project's code, in a process of its
own for each reader. Without it they are mutations of known inputs, drawn by seed.

    python -m benchmarks.chaos.fuzz READER SEED SECONDS      one reader under atheris, in this process
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from benchmarks.chaos.findings import Round
from benchmarks.chaos.mutate import mutated

PACKAGES = ["data_prep", "configs", "training"]
MAX_BYTES = 1 << 14
SLOWER = 20  # times fewer inputs for a reader that is slow
GRACE_SECONDS = 900  # to import instrumented code on a busy machine, and for the last input


def feed(seed: int, folder: Path, inputs: int = 300) -> Round:
    """Mutations of known inputs, to all readers in turn."""
    from benchmarks.chaos.readers import READERS

    found, draw = Round(), random.Random(seed)
    for name, reader in READERS.items():
        place = folder / name
        place.mkdir(parents=True)
        for _ in range(inputs // SLOWER if reader.slow else inputs):
            fault = _fed(name, mutated(draw, draw.choice(reader.seeds)), place)
            found.tried += 1
            if fault:
                found.found(*fault)
                break
    return found


def grown(name: str, seed: int, seconds: int) -> Round:
    """One reader under atheris for some seconds."""
    found = Round()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="panda-fuzz-") as folder:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.chaos.fuzz", name, str(seed), str(seconds)],
            cwd=Path(__file__).parents[2], env={**environment, "TMPDIR": folder}, capture_output=True,
            check=False, timeout=seconds + GRACE_SECONDS,
        )  # fmt: skip
    output = (done.stdout + done.stderr).decode("utf-8", "replace")
    said = [json.loads(line.removeprefix("FOUND ")) for line in output.splitlines() if line.startswith("FOUND ")]
    runs = [line for line in output.splitlines() if line.startswith("stat::number_of_executed_units:")]
    found.tried = int(runs[0].split()[-1]) if runs else 0
    for kind, what in said:
        found.found(kind, what)
    if not said and done.returncode:
        found.found("untyped", f"{name}: the fuzzer ended with {done.returncode}: {output[-400:]}")
    return found


def has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def _fed(name: str, data: bytes, folder: Path) -> tuple[str, str] | None:
    """(kind, what) if a reader does anything but read or refuse."""
    from benchmarks.chaos.readers import READERS, Wrong

    reader = READERS[name]
    try:
        reader.read(data, folder)
    except reader.refuses:
        return None
    except Wrong as error:
        return "wrong", f"{name}: {error}; input {data[:200]!r}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
        return "untyped", f"{name}: {type(error).__name__} at {place}: {str(error)[:120]}; input {data[:200]!r}"
    return None


def main(name: str, seed: int, seconds: int) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=PACKAGES, enable_loader_override=False):
        from benchmarks.chaos.readers import READERS
    atheris.enabled_hooks.add("RegEx")
    work = Path(tempfile.mkdtemp(prefix="panda-fuzz-"))
    corpus = work / "corpus"
    corpus.mkdir()
    for number, data in enumerate(READERS[name].seeds):
        (corpus / str(number)).write_bytes(data)
    draw = random.Random(seed)
    place = work / "files"
    place.mkdir()

    def one_input(data: bytes) -> None:
        fault = _fed(name, data, place)
        if fault:
            print("FOUND " + json.dumps(fault), flush=True)
            os._exit(77)

    def one_mutation(data: bytes, max_size: int, number: int) -> bytes:
        draw.seed(number)
        return mutated(draw, data)[:max_size] if draw.random() < 0.3 else atheris.Mutate(data, max_size)

    options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={MAX_BYTES}", "-print_final_stats=1"]
    limits = ["-timeout=30", "-rss_limit_mb=4096", f"-artifact_prefix={work}/"]
    atheris.Setup([sys.argv[0], *options, *limits, str(corpus)], one_input, custom_mutator=one_mutation)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
