"""The line at the bottom of a terminal: there, below the logs, gone afterwards; nothing of it in a pipe."""

import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from tasks.bar import BLOCKS, Bar, sparkline

WORK = """
import logging, os
os.environ["PREFECT_LOGGING_TO_API_ENABLED"] = "false"
from prefect.logging.configuration import setup_logging
setup_logging()
from tasks.bar import BAR
import tasks.bar
tasks.bar.SECONDS = 0
logger = logging.getLogger("flows.work")
for step in range(1, 6):
    BAR.show("train", step, 5, f"{step} of 5 steps" + ", and more to say of them" * 8, 6.0 - step)
    if step == 3:
        logger.warning("in between")
BAR.close()
logger.warning("afterwards")
"""


def in_a_terminal(columns: int, work: str = WORK) -> str:
    """Everything that is written to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-c", work], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other side has been closed
            break
        if not part:
            break
        written += part
    assert process.wait() == 0, written.decode()
    os.close(ours)
    return written.decode()


def on_screen(written: str) -> list[str]:
    """What is left to be seen: a terminal of lines, of which the last may be erased and drawn again."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d*)A", part):
            row -= int(up.group(1) or 1)
        elif part == "\r" or part.startswith("\x1b"):
            continue
        else:
            lines[row] = lines[row] + part if part else lines[row]
    return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def wide() -> str:
    return in_a_terminal(160)


class TestInATerminal:
    def test_it_is_one_line(self, wide):
        assert wide.count("\x1b[1A") == 1, "only to take it away"
        assert "[bold]" not in wide and "[cyan]" not in wide

    def test_it_is_drawn(self, wide):
        assert "3 of 5 steps" in wide and "5 of 5 steps" in wide and BLOCKS[-1] in wide

    def test_logs_stay_whole_and_the_line_goes(self, wide):
        left = on_screen(wide)
        assert len(left) == 2 and left[0].endswith("in between") and left[1].endswith("afterwards")

    def test_the_cursor_comes_back(self, wide):
        assert wide.rfind("\x1b[?25h") > wide.rfind("\x1b[?25l")

    def test_a_narrow_one_has_no_sparkline(self):
        written = in_a_terminal(60)
        assert "5 of 5 steps" in written and not set(BLOCKS) & set(written)


def test_nothing_of_it_in_a_pipe():
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    assert [line.rpartition(" - ")[2] for line in done.stderr.splitlines()] == ["in between", "afterwards"]
    assert not done.stdout and "\x1b" not in done.stderr


def test_a_terminal_that_cannot_be_drawn_in_costs_nothing(monkeypatch):
    def no_terminal():
        raise OSError("it has gone")

    monkeypatch.setattr("tasks.bar.terminal_of_logs", no_terminal)
    bar = Bar()
    for step in (1, 2):
        bar.show("train", step, 2, f"{step} of 2 steps")
    bar.close()
    assert bar.broken


def test_without_prefects_handler_there_is_no_line(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger("prefect"), "handlers", [])
    bar = Bar()
    bar.show("train", 1, 2, "1 of 2 steps")
    assert bar.live is None
    bar.close()


@pytest.mark.parametrize(
    ("values", "shown"),
    [([], ""), ([1.0], "▁"), ([3.0, 3.0], "▁▁"), ([0.0, 7.0], "▁█"), ([8.0, 4.0, 0.0], "█▅▁")],
)
def test_sparkline(values, shown):
    assert sparkline(values) == shown


def test_of_many_values_it_shows_stretches():
    assert len(sparkline([float(i) for i in range(1000)])) == 20


OF_THE_COMMAND_LINE = WORK.replace(
    "from prefect.logging.configuration import setup_logging\nsetup_logging()",
    "from flows.cli.main import guarded\nguarded(lambda: 0, False)",
)


def test_of_train_py_too():
    """Its logs do not go through Prefect's handler."""
    written = in_a_terminal(160, OF_THE_COMMAND_LINE)
    assert "5 of 5 steps" in written and BLOCKS[-1] in written and written.count("\x1b[1A") == 1
    left = on_screen(written)
    assert len(left) == 2 and left[0].endswith("in between") and left[1].endswith("afterwards")
