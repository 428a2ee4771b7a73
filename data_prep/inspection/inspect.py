"""What a plan looks like: coloured examples, a histogram of lengths, how full the rows are.

In: a plan directory and its tokenizer. Out: `Inspection`, plain data, and its renderings for a terminal (rich), as HTML
and as Markdown (the Prefect artifact). The examples are drawn by content hash, so the same plan shows the same ones.
Cost: reading the ledger and the plan, a second for a million records.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console, Group
from rich.table import Table

from data_prep.inspection.render import Shown, as_html, as_markdown, as_terminal, show_example
from data_prep.plan.ledger import Ledger, open_ledger
from data_prep.plan.plan_file import open_rows, rows_file
from data_prep.plan.report import DataReport
from data_prep.tokenizer import LoadedTokenizer

BAR = 40


@dataclass(frozen=True)
class Packing:
    """How full the rows of a split are."""

    split: str
    rows: int
    tokens: int
    target_tokens: int
    utilisation: float
    segments_per_row: float
    rows_below_99_percent: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect_plan` finds. ``lengths`` is (up to so many tokens, examples)."""

    report: DataReport
    examples: list[Shown]
    lengths: list[tuple[int, int]]
    packing: list[Packing]


def inspect_plan(plan_dir: Path, tokenizer: LoadedTokenizer, num_examples: int = 3) -> Inspection:
    """Look at a plan; ``num_examples`` are shown of each source."""
    ledger = open_ledger(plan_dir)
    return Inspection(
        report=ledger.manifest["report"],
        examples=_examples(ledger, tokenizer, num_examples),
        lengths=histogram(ledger.accepted()["tokens"].to_numpy()),
        packing=[
            _packing(ledger.plan_dir, split, ledger.manifest["max_seq_length"]) for split in ("train", "validation")
        ],
    )


def histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Examples per power of two of tokens: (upper bound, count), from the first to the last that is not empty."""
    if not len(lengths):
        return []
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = np.bincount(powers)
    return [(2**power, int(counts[power])) for power in range(int(powers.min()), len(counts))]


def _examples(ledger: Ledger, tokenizer: LoadedTokenizer, num_examples: int) -> list[Shown]:
    accepted = ledger.accepted()
    sources = accepted["source"].cast(pa.string()).to_numpy(zero_copy_only=False)
    order = pc.sort_indices(accepted["hash"]).to_numpy()
    chosen = [
        index for source in ledger.manifest["sources"] for index in order[sources[order] == source][:num_examples]
    ]
    shown = []
    for index in chosen:
        entry = accepted.slice(int(index), 1).to_pylist()[0]
        title = f"{entry['file']}:{entry['line']} ({entry['source']}, {entry['split']})"
        shown.append(show_example(ledger.tokens_dir(entry["shard"]), entry["example"], tokenizer, title))
    return shown


def _packing(plan_dir: Path, split: str, max_seq_length: int) -> Packing:
    rows = open_rows(plan_dir / rows_file(split))
    tokens = int(rows.tokens.sum(dtype=np.int64))
    return Packing(
        split=split,
        rows=rows.num_rows,
        tokens=tokens,
        target_tokens=int(rows.target_tokens.sum(dtype=np.int64)),
        utilisation=tokens / max(rows.num_rows * max_seq_length, 1),
        segments_per_row=len(rows.length) / max(rows.num_rows, 1),
        rows_below_99_percent=int((rows.tokens < 0.99 * max_seq_length).sum()),
    )


def print_inspection(inspection: Inspection, console: Console) -> None:
    """For a terminal."""
    console.print(
        _packing_table(inspection), _histogram_table(inspection), Group(*map(as_terminal, inspection.examples))
    )


def inspection_html(inspection: Inspection) -> str:
    """A page of its own."""
    style = "font-family:sans-serif;max-width:60em;margin:2em auto"
    head = '<!doctype html><meta charset="utf-8"><title>Prepared data</title>'
    tables = "".join(_html_table(title, *table) for title, table in _tables(inspection))
    return f'{head}<body style="{style}">{tables}{"".join(map(as_html, inspection.examples))}</body>\n'


def inspection_markdown(inspection: Inspection) -> str:
    """Tables and marked examples."""
    tables = "\n".join(_markdown_table(title, *table) for title, table in _tables(inspection))
    return tables + "\n### Examples\n\n" + "\n".join(map(as_markdown, inspection.examples))


_PACKING_HEADER = ("split", "rows", "tokens", "targets", "full", "segments/row", "rows below 99 %")


def _packing_lines(inspection: Inspection) -> list[tuple[str, ...]]:
    return [
        (
            packing.split,
            f"{packing.rows:,}",
            f"{packing.tokens:,}",
            f"{packing.target_tokens:,}",
            f"{100 * packing.utilisation:.2f} %",
            f"{packing.segments_per_row:.1f}",
            f"{packing.rows_below_99_percent:,}",
        )
        for packing in inspection.packing
    ]


def _histogram_lines(inspection: Inspection) -> list[tuple[str, ...]]:
    most = max([count for _, count in inspection.lengths], default=1)
    return [(f"≤ {bound:,}", f"{count:,}", "█" * -(-BAR * count // most)) for bound, count in inspection.lengths]


def _tables(inspection: Inspection) -> list[tuple[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]]:
    return [
        ("Packing", (_PACKING_HEADER, _packing_lines(inspection))),
        ("Lengths of accepted examples", (("tokens", "examples", ""), _histogram_lines(inspection))),
    ]


def _packing_table(inspection: Inspection) -> Table:
    return _rich_table("Packing", _PACKING_HEADER, _packing_lines(inspection))


def _histogram_table(inspection: Inspection) -> Table:
    return _rich_table("Lengths of accepted examples", ("tokens", "examples", ""), _histogram_lines(inspection))


def _rich_table(title: str, header: tuple[str, ...], lines: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number in (0, 2) and name in ("split", "tokens", "") else "right")
    for line in lines:
        table.add_row(*line)
    return table


def _markdown_table(title: str, header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rows = [header, ("---",) * len(header), *lines]
    return f"### {title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _html_table(title: str, header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<h3>{title}</h3><table><tr>{head}</tr>{body}</table>\n"
