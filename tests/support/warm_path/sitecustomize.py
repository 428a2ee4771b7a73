"""Programs that a test starts ask its nursery (`tests/support/warm.py`) for the supervisor of their ranks.

Python imports this file by its name where its folder is on PYTHONPATH. In: the socket of a nursery in `PANDA_NURSERY`.
Out: `subprocess.Popen` of the supervisor's module gives a child of the nursery; any other is what it was.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from io import FileIO
from typing import Any

SUPERVISOR = ["-m", "training.launch.supervisor"]


class Supervisor:
    """What the launcher uses of a `Popen` with pipes."""

    def __init__(self, env: dict[str, str], pass_fds: Sequence[int]) -> None:
        to_read, to_write = os.pipe(), os.pipe()
        self.stdin, self.stdout = FileIO(to_read[1], "w"), FileIO(to_write[0])
        self._ended = socket.socket(socket.AF_UNIX)
        self._ended.connect(os.environ["PANDA_NURSERY"])
        job = {"cwd": os.getcwd(), "env": env}
        socket.send_fds(self._ended, [json.dumps(job).encode() + b"\n"], [to_read[0], to_write[1], 2, *pass_fds])
        os.close(to_read[0])
        os.close(to_write[1])

    def wait(self) -> None:
        """Until the nursery has reaped it: then it hangs up."""
        self._ended.recv(1)
        self._ended.close()


class Popen(subprocess.Popen):
    """`subprocess.Popen` but for one command."""

    def __new__(cls, args: Any, *_: Any, **options: Any) -> Any:
        asked = isinstance(args, list) and args == [sys.executable, *SUPERVISOR]
        return Supervisor(options["env"], options["pass_fds"]) if asked else super().__new__(cls)


if "PANDA_NURSERY" in os.environ:
    subprocess.Popen = Popen  # type: ignore[misc]  # its twin from here on
