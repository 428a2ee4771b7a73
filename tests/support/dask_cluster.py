"""A Dask cluster on this machine, started by the commands of the documentation.

In: a folder, for logs and the workers' files; workers find the modules there. Out: an address and processes.
Cost: five seconds.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.stack import ROOT, wait_for
from training.launch.processes import free_port


class Cluster:
    """A scheduler and two workers of a thread each, with nobody who starts them again."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port = folder, port
        self.start()

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Also again, after `kill`, at the same address."""
        self.scheduler = self._dask("scheduler", "--host", "127.0.0.1", "--port", str(self.port))
        self.workers: list[subprocess.Popen] = []
        self.add_workers()

    def add_workers(self) -> None:
        """Two, when the scheduler knows them."""
        options = ["--nthreads", "1", "--no-nanny", "--local-directory", str(self.folder / "dask")]
        added = [self._dask("worker", self.address, *options) for _ in range(2)]
        wait_for(lambda: all("Registered to" in self._log(worker) for worker in added), 60, "two workers")
        self.workers += added

    def kill(self) -> None:
        """All that is left of it; the scheduler first, which then gives the workers' batches to nobody."""
        for process in [self.scheduler, *self.workers]:
            process.kill()
            process.wait()

    def _dask(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
        with open(self.folder / "starting.log", "wb") as log:
            env = {**os.environ, "PYTHONPATH": f"{ROOT}:{self.folder}"}
            process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=log)
        (self.folder / "starting.log").rename(self.folder / f"{process.pid}.log")
        return process

    def _log(self, process: subprocess.Popen) -> str:
        log = (self.folder / f"{process.pid}.log").read_text()
        assert process.poll() is None, log
        return log


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """It lives inside."""
    made = Cluster(folder, free_port())
    try:
        yield made
    finally:
        made.kill()
