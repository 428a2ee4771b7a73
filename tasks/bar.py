"""One line at the bottom of a terminal: how far a stage is, how fast, how long it will take, and where the loss goes.

In: numbers of the stage, as often as it likes. Out: a line that is drawn anew ten times a second at most, below the
logs (their handler and this one share a console, which moves the line down before it prints); nothing at all where logs
do not go to a terminal. Cost: a millisecond a drawing; no thread.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SECONDS = 0.1
BLOCKS = "▁▂▃▄▅▆▇█"
BAR_WIDTH, SPARKLINE_WIDTH = 24, 20
WIDE = 100  # a narrower terminal gets no sparkline

logger = logging.getLogger(__name__)


@dataclass
class Bar:
    """The line; there is one, because there is one terminal."""

    live: Live | None = None
    drawn: float = 0.0
    broken: bool = False
    values: list[float] = field(default_factory=list)

    def show(self, stage: str, done: int, total: int, text: str, value: float | None = None) -> None:
        """Draw it, if it is time to. `value`: of this step, for the sparkline."""
        if value is not None:
            self.values.append(value)
        now = time.monotonic()
        if self.broken or (now - self.drawn < SECONDS and done < total):
            return
        self.drawn = now
        try:
            self._draw(stage, done, total, text)
        except Exception:  # whatever a terminal has against it, the stage goes on
            self.close()
            self.broken = True
            logger.warning("no line in this terminal", exc_info=True)

    def _draw(self, stage: str, done: int, total: int, text: str) -> None:
        if self.live is None:
            console = terminal_of_logs()
            if console is None:
                return
            self.live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False,
                             redirect_stderr=False)  # fmt: skip
            self.live.start()
        width = self.live.console.width
        bar_width = min(BAR_WIDTH, max(8, width // 5))
        loss = sparkline(self.values) if width >= WIDE else ""
        line = Table.grid(padding=(0, 1))
        for room in (len(stage), bar_width, max(1, width - len(stage) - bar_width - len(loss) - 4), len(loss)):
            line.add_column(no_wrap=True, overflow="ellipsis", max_width=room)
        bar = ProgressBar(
            total=max(total, 1), completed=done, width=bar_width,
            style="bright_black", complete_style="cyan", finished_style="green",
        )  # fmt: skip  # Prefect's console knows none of rich's own styles
        line.add_row(Text(stage, "bold"), bar, Text(text), Text(loss, "cyan"))
        self.live.update(line, refresh=True)

    def close(self) -> None:
        """Take the line away: the stage has ended, in whatever way."""
        if self.live is not None:
            self.live.stop()
        self.live, self.values = None, []


BAR = Bar()


def terminal_of_logs() -> Console | None:
    """The console that logs go to, where that is a terminal in which a line can be drawn again."""
    handlers = [*logging.getLogger().handlers, *logging.getLogger("prefect").handlers]
    consoles = [getattr(handler, "console", None) for handler in handlers]
    terminals = [one for one in consoles if isinstance(one, Console) and one.is_terminal]
    return next((one for one in terminals if not one.is_dumb_terminal), None)


def sparkline(values: Sequence[float]) -> str:
    """Means of equal stretches of the values, from the lowest block to the highest."""
    if not values:
        return ""
    width = min(SPARKLINE_WIDTH, len(values))
    cuts = [len(values) * part // width for part in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    steps = [(mean - low) / (high - low) if high > low else 0.0 for mean in means]
    return "".join(BLOCKS[min(int(step * len(BLOCKS)), len(BLOCKS) - 1)] for step in steps)
