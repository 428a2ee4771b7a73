"""One owner of a run directory: a second is refused, who was taken over publishes nothing, leftovers are awaited."""

import os
import subprocess
import sys
import time

import pytest

from training.launch import launcher, ownership
from training.launch.ownership import NotOwner, check, is_free, owner_of, owning

HOLD = """
import sys, time
from pathlib import Path
from training.launch.ownership import owning
with owning(Path(sys.argv[1]), "flow-1"):
    print("owned", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """A run of another process that is at work in the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_two_at_once_are_refused_and_the_next_one_may(tmp_path, other):
    with (
        pytest.raises(NotOwner, match=rf"process {other.pid} on .* \(flow run flow-1\) is at work there"),
        owning(tmp_path),
    ):
        pass
    other.stdin.close()
    assert other.wait() == 0
    with owning(tmp_path, "flow-2"):
        assert owner_of(tmp_path)["flow_run"] == "flow-2" and not is_free(tmp_path)
        check(tmp_path)
    assert is_free(tmp_path) and ownership.TOKEN not in os.environ


def test_a_killed_owner_leaves_the_directory_free(tmp_path, other):
    other.kill()
    other.wait()
    with owning(tmp_path):
        check(tmp_path)


def test_who_was_taken_over_publishes_nothing(tmp_path):
    with owning(tmp_path, "old"):
        ownership.write_atomically(tmp_path / ownership.OWNER, '{"token": "another", "pid": 7, "host": "elsewhere"}')
        with pytest.raises(NotOwner, match="taken over by process 7 on elsewhere"):
            check(tmp_path)
    check(tmp_path)  # by hand, outside of a run


def test_what_a_killed_flow_has_left_is_waited_for(tmp_path):
    """The supervisor holds the lock as well: it is free when the last of its ranks has ended."""
    with owning(tmp_path):
        with launcher.supervised([], 0.1):
            pass
        holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=ownership.held())
        token = owner_of(tmp_path)
    assert not is_free(tmp_path)
    gone = {**token, "pid": _pid_of_nobody()}
    ownership.write_atomically(tmp_path / ownership.OWNER, ownership.json.dumps(gone))
    began = time.monotonic()
    ending = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    with owning(tmp_path):
        assert time.monotonic() > began and holder.wait() == -9
    ending.wait()
    holder.stdin.close()


def _pid_of_nobody() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid
