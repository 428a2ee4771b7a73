"""Care for processes: who is an orphan, also where the systemd of a session takes orphans in."""

import signal
import subprocess
import sys

import psutil

from training.launch.processes import is_alive, is_orphan

ADOPTS = """
import ctypes, subprocess, sys
from training.launch.processes import adopt_orphans
adopt_orphans()
ctypes.CDLL(None).prctl(15, b"systemd", 0, 0, 0)  # PR_SET_NAME
child = "import subprocess as s; print(s.Popen(['sleep', '60'], stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout, flush=True)
sys.stdin.read()
"""


def test_who_is_an_orphan():
    adopting = subprocess.Popen(
        [sys.executable, "-c", ADOPTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    left = psutil.Process(int(adopting.stdout.readline()))
    try:
        assert left.ppid() == adopting.pid != 1
        assert is_orphan(left) and not is_orphan(psutil.Process(adopting.pid)) and not is_orphan(psutil.Process())
    finally:
        left.kill()
        adopting.communicate()
    assert not is_alive(left.pid)


def test_a_parent_that_died_before_the_kernel_was_asked_is_noticed():
    ask = "import os; from training.launch.processes import die_with_parent; die_with_parent(parent={}); print('alive')"
    living = subprocess.run([sys.executable, "-c", ask.format("os.getppid()")], capture_output=True, check=True)
    gone = subprocess.run([sys.executable, "-c", ask.format("os.getppid() + 1")], capture_output=True, check=False)
    assert (living.stdout, gone.stdout, gone.returncode) == (b"alive\n", b"", -signal.SIGKILL)
