"""How a rank leaves: with the code of what happened, with all it printed, and without the interpreter's teardown."""

import subprocess
import sys

import pytest

from training.launch.exits import ExitReason

RANK = """
import atexit, logging, os, sys
from data_prep.errors import CorpusError
from training.launch.exits import run_rank

atexit.register(os.abort)  # what a thread of torch's does to one finished run in many

def main():
    print("printed, not flushed")
    {ending}

run_rank(main)
print("never reached")
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("return", 0),
        ("sys.exit()", 0),
        ("raise CorpusError('a.json line 7')", ExitReason.data.code),
        ("raise RuntimeError('Connection closed by peer')", ExitReason.lost_rank.code),
        ("raise KeyboardInterrupt", ExitReason.cancelled.code),
        ("sys.exit(2)", ExitReason.infrastructure.code),
    ],
)
def test_a_rank_leaves_with_its_code_whatever_the_teardown_would_do(ending, code):
    command = [sys.executable, "-c", RANK.format(ending=ending)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith("printed, not flushed\n") and "never reached" not in done.stdout


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (
            "raise OSError(28, 'No space left on device', '/d/metrics.jsonl')",
            "infrastructure: /d/metrics.jsonl: No space",
        ),
        ("raise RuntimeError('Connection closed by peer')", "lost_rank: Connection closed by peer"),
    ],
)
def test_a_full_disk_and_a_peer_that_is_gone_are_one_line(ending, said):
    command = [sys.executable, "-c", RANK.format(ending=ending)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1, done.stderr


def test_what_nobody_expects_has_a_traceback():
    command = [sys.executable, "-c", RANK.format(ending="raise ValueError('odd')")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "Traceback" in done.stderr and done.stderr.endswith("infrastructure: odd\n")
