"""A small worker for the tests of launching: real processes that spawn, ignore SIGTERM, crash, stall or need memory.

Started like the real one (`python -m tests.support.ranks --config RUN/config.yaml [--resume]`); RUN/config.yaml says
what it does: `behaviour: {rank: name}`. No torch, so a rank is up in 0.1 s.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from data_prep.errors import CorpusError
from training.launch.events import emit
from training.launch.exits import NonFiniteError, TrainingStopped, run_rank

RANK = int(os.environ["RANK"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    config = yaml.safe_load(Path(arguments.config).read_text())
    emit({"event": "hello", "rank": RANK, "pid": os.getpid(), "resume": arguments.resume})
    BEHAVIOURS[config["behaviour"].get(RANK, "finish")](config, arguments)


def finish(config, arguments):
    for step in range(3):
        print(f"step {step} of rank {RANK}")
        emit({"event": "step", "step": step})


def begin_lines(config, arguments):
    """As another rank does that shares the log: `print` writes a line and its end separately there."""
    for step in range(3):
        os.write(1, b"half a line")
        emit({"event": "step", "step": step})


def sleep_for_long(*_):
    emit({"event": "step", "step": 1})
    time.sleep(300)


def obey_sigterm(config, arguments):
    def stop(*_):
        Path(arguments.config).with_name(f"stopped-{RANK}").touch()
        raise TrainingStopped("checkpoint written")

    signal.signal(signal.SIGTERM, stop)
    sleep_for_long()


def ignore_sigterm(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep_for_long()


def spawn_daemons(*_):
    """Children that leave the session and the parent, as daemons and data loaders do."""
    code = "import os, signal, time; os.setsid(); signal.signal(15, signal.SIG_IGN); os.fork() or time.sleep(300)"
    code += "; time.sleep(300)"
    subprocess.Popen([sys.executable, "-c", code])
    subprocess.Popen(["sh", "-c", f"setsid {sys.executable} -c 'import time; time.sleep(300)' & exit 0"]).wait()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep_for_long()


def crash(*_):
    time.sleep(0.3)
    raise RuntimeError("the true cause")


def crash_as_peer(*_):
    """What gloo raises on the ranks that survive another one."""
    time.sleep(0.3)
    raise RuntimeError("[..] Connection closed by peer [127.0.0.1]")


def kill_itself(*_):
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def crash_in_c(*_):
    import ctypes

    time.sleep(0.3)
    ctypes.string_at(0)


def bad_data(*_):
    raise CorpusError("dataset/a.json line 7: no `target`; add one")


def not_finite(*_):
    raise NonFiniteError("loss is nan in step 3 on rank 0: a.json line 7")


def need_small_batch(config, arguments):
    if config["per_gpu_train_batch_size"] > 2:
        raise MemoryError(f"micro-batch {config['per_gpu_train_batch_size']}")
    finish(config, arguments)


def always_out_of_memory(*_):
    raise MemoryError("no batch is small enough")


def stall(*_):
    finish(None, None)
    a_function_that_hangs()


def a_function_that_hangs():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(300)


def add_up_ranks(config, arguments):
    """A collective over all ranks of all machines; with `then`, some of them fail after it."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([RANK + 1])
    dist.all_reduce(total)
    emit({"event": "sum", "rank": RANK, "sum": int(total), "local_rank": int(os.environ["LOCAL_RANK"])})
    BEHAVIOURS[config.get("then", {}).get(RANK, "wait_for_peers" if "then" in config else "finish")](config, arguments)
    dist.destroy_process_group()


def wait_for_peers(*_):
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.zeros(1))


def talk_a_lot(*_):
    for number in range(20_000):
        print(f"line {number}")


BEHAVIOURS = {name: value for name, value in globals().items() if callable(value) and name != "main"}

if __name__ == "__main__":
    run_rank(main)
