"""The training worker on a slow disk: `python -m benchmarks.throttled --config RUN/config.yaml`, as `training.worker`.

In: PANDA_DISK_BYTES_PER_SECOND, what all ranks together may write into checkpoints. Out: what the worker
writes. Each rank gets its share, and sleeps after every chunk until the share allows the next one: like a process that
waits for a disk it takes no processor, and the lock of the interpreter is free. Reading is not throttled.
"""

import os
import time
from typing import Any

from training.launch.exits import run_rank

RATE = "PANDA_DISK_BYTES_PER_SECOND"


def throttle(rate: float) -> None:
    """Make every write of a checkpoint's file take as long as its bytes do at `rate`."""
    from training.trainer import state_files

    write, free_at = state_files.write_chunk, 0.0

    def write_slowly(stream: Any, chunk: memoryview) -> None:
        nonlocal free_at
        size = len(chunk)
        write(stream, chunk)
        free_at = max(free_at, time.monotonic()) + size / rate
        time.sleep(max(0.0, free_at - time.monotonic()))

    state_files.write_chunk = write_slowly


def main() -> None:
    """Throttle, then be the worker."""
    from training import worker

    throttle(float(os.environ[RATE]) / int(os.environ.get("WORLD_SIZE", "1")))
    worker.main()


if __name__ == "__main__":
    run_rank(main)
