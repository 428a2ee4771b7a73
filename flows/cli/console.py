"""Where tables and reports are printed: as wide as the terminal, and without any limit where they are piped.

In: nothing. Out: a rich console for stdout, one for logs; tables whose names are never cut. A file or a pipe has no
width; rich would take it for a terminal of 80 columns, and cut or break the names that the next program is to read.
Cost: none.
"""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

UNLIMITED = 100_000


def stdout_console(highlight: bool = False) -> Console:
    """A console for stdout as it is now."""
    return Console(highlight=highlight, width=None if sys.stdout.isatty() else UNLIMITED)


def stderr_console() -> Console:
    """A console for the lines of logs, as they are."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def plain_table(num_columns: int, indent: int = 0, **options: Any) -> Table:
    """A table without heads and lines. In a narrow terminal a long name goes on in the next line."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, indent), **options)
    for _ in range(num_columns):
        table.add_column(overflow="fold")
    return table
