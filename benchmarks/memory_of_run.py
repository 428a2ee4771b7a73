"""Peak anonymous memory of every process of whole runs: load, train, checkpoint, kill -9, resume, evaluate, register,
gate, export.

    python -m benchmarks.memory_of_run --layers 24 --ways "LoRA, ZeRO 3" "LoRA, FSDP" "4 bits, ZeRO 3" "4 bits, FSDP"

In: nothing; a random Llama (1.1 billion float32 weights unless told otherwise) and a small corpus are made in
`--directory`, or a temporary one. Each way is trained by `train.py`, which is killed with SIGKILL, its ranks too, after
its first checkpoint, and gone on with; the first way's version is made the champion, with which the others are
compared. Each version is exported and loaded by plain transformers. Out: a table, per command its wall time and the
peak of each process; the exit code is 1 where one holds more than its share of the model and 1 GB. Anonymous memory is
what `/proc/PID/smaps_rollup` says, looked at 20 times a second; pages mapped from files are not in it. Cost: 4.4 GB on
disk and again for every export, 9 GB of memory, ten minutes or more a way on two cores.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.memory_of_ranks import BEYOND, WAYS, anonymous, write_model
from benchmarks.memory_of_use import beside

ROOT = Path(__file__).resolve().parents[1]
EVERY_SECONDS = 0.05
LOOKS = 20  # at each process, before new ones are looked for, which costs more
NAME = "random"
SETTINGS = {
    "gradient_accumulation_steps": 1, "max_steps": 2, "save_steps": 1, "max_seq_length": 32, "validation_fraction": 0.1,
    "learning_rate": 1e-3, "warmup_steps": 1, "registered_model_name": NAME, "prepare_workers": 1, "stall_seconds": 0,
}  # fmt: skip


def main() -> int:
    """Train in every way, export, load; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["LoRA, ZeRO 3", "LoRA, FSDP", "4 bits, ZeRO 3"])
    parser.add_argument("--directory", type=Path, help="a directory to keep, in which ways can be added")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memory-of-run-") as temporary:
        root = arguments.directory or Path(temporary)
        size = base_model(root, arguments.layers)
        limit = size / arguments.ranks + BEYOND
        print(
            f"weights {size / 1e9:.2f} GB, {arguments.ranks} ranks; limit of a process {limit / 1e9:.2f} GB", flush=True
        )
        largest = [0.0]
        for way in arguments.ways:
            print(way, flush=True)
            largest += run_of(root, WAYS[way], arguments.ranks)
    print(f"largest {max(largest) / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB")
    return 0 if max(largest) <= limit else 1


def base_model(root: Path, layers: int) -> int:
    """ROOT/base and ROOT/data, unless they are there; the bytes of the weights."""
    base, data = root / "base", root / "data"
    if not data.is_dir():
        base.mkdir(parents=True)
        write_model(base, layers, 8192)
        (data / "instructions").mkdir(parents=True)
        (data / "instructions" / "one.json").write_text(json.dumps([{"input": "hello", "target": "world"}]))
        (data / "documents").mkdir()
        lines = [json.dumps({"text": f"hello world, this is test {number} of {number + 1}"}) for number in range(60)]
        (data / "documents" / "all.jsonl").write_text("\n".join(lines))
    return sum(file.stat().st_size for file in base.glob("*.safetensors"))


def run_of(root: Path, way: dict, ranks: int) -> list[float]:
    """One way from load to export; the peaks."""
    outputs = root / "outputs"
    number = len(list(outputs.glob("run-*"))) + 1
    run_dir = outputs / f"run-{number}"
    where = {"output_dir": str(outputs), "cache_dir": str(root / "cache")}
    kinds = {"pretraining_data_dir": "documents", "instruction_tuning_data_dir": "instructions"}
    corpus = {name: str(root / "data" / kind) for name, kind in kinds.items()}
    conf = root / f"run-{number}.json"  # JSON is YAML
    values = {**SETTINGS, **way, **where, **corpus, "ckpt_path": str(root / "base"), "run_name": run_dir.name}
    conf.write_text(json.dumps({**values, "num_processes": ranks}))
    train = [sys.executable, "train.py", "--conf_path", str(conf)]
    flags = [text for name, value in where.items() for text in (f"--{name}", value)]
    peaks = [
        measured("train until killed", train, kill_after=run_dir / "checkpoints"),
        measured("go on to the end", [*train, "--resume"]),
    ]
    if number == 1:
        panda("promote", f"models:/{NAME}/1", "--despite_gate", *flags)
    else:
        shown = json.loads((run_dir / "gate.json").read_text())
        print(f"  compared with {shown['champion']}: promoted {shown['promoted']}", flush=True)
    target = root / "exported"
    verb = [sys.executable, "-m", "flows.cli.main", "export", f"models:/{NAME}/{number}", str(target)]
    peaks.append(measured("export", [*verb, *flags]))
    load_plainly(target)
    return [peak for one in peaks for peak in one]


def panda(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "flows.cli.main", *words], cwd=ROOT, check=True, capture_output=True)


def load_plainly(target: Path) -> None:
    """What was exported, by plain transformers; then it is deleted."""
    program = (
        "import sys, torch, transformers;"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(tokenizer.decode(model.generate(**tokenizer('hello', return_tensors='pt'), max_new_tokens=4)[0]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(target)], check=True, capture_output=True, text=True)
    print(f"  plain transformers says {done.stdout.strip()!r}", flush=True)
    for file in target.iterdir():
        file.unlink()
    target.rmdir()


def measured(what: str, command: list[str], kill_after: Path | None = None) -> list[float]:
    """Run a command to its end, or SIGKILL it when a checkpoint is there; print and return the peaks."""
    peaks: dict[str, float] = {}
    began = time.monotonic()
    try:
        with tempfile.TemporaryFile("w+") as log, watched(peaks):
            wanted: dict[str, Any] = {"stdout": log, "stderr": log, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
            process = subprocess.Popen(command, cwd=ROOT, **wanted)
            while process.poll() is None:
                if kill_after and list(kill_after.glob("step-*/complete.json")):
                    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                        one.kill()  # ranks and supervisor as well
                time.sleep(EVERY_SECONDS)
            log.seek(0)
            assert process.returncode == (-signal.SIGKILL if kill_after else 0), log.read()[-5000:]
    finally:  # what was seen of a run that ended badly says why
        shown = ", ".join(f"{name} {peak / 1e9:.2f}" for name, peak in sorted(peaks.items()))
        print(f"  {what}, {time.monotonic() - began:.0f} s: {shown}", flush=True)
    return list(peaks.values())


@contextmanager
def watched(peaks: dict[str, float]) -> Iterator[None]:
    """Note the peaks of all that this process starts, by what they run and their rank."""

    def look(done: threading.Event) -> None:
        while not done.is_set():
            found = {process.pid: name_of(process) for process in psutil.Process().children(recursive=True)}
            for _ in range(LOOKS):
                for pid, name in found.items():
                    if name:
                        peaks[name] = max(peaks.get(name, 0.0), anonymous(pid))
                done.wait(EVERY_SECONDS)

    with beside(look):
        yield


def name_of(process: psutil.Process) -> str | None:
    """The module or program a process runs, and its rank; None while it is not known."""
    try:
        words, rank = process.cmdline(), process.environ().get("RANK", "")
    except psutil.Error:
        return None
    if "-m" in words[:-1]:
        return f"{words[words.index('-m') + 1].rpartition('.')[2]} {rank}".strip()
    return next((Path(word).name for word in words[1:] if word.endswith(".py")), "others") if len(words) > 1 else None


if __name__ == "__main__":
    sys.exit(main())
