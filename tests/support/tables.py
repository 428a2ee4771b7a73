"""The same records in every form of file that is read."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.plan.reader import open_plan
from data_prep.records.shard import RecordsResult, read_arrow

FORMS = ("jsonl", "parquet", "csv", "tsv", "arrow")


def records(number: int) -> list[dict[str, str]]:
    """With what CSV has to quote, and with Chinese."""
    return [
        {
            "instruction": f'Question "{i}", of\ntwo lines\tand 第{i}题',
            "input": "" if i % 2 else f"in {i}",
            "output": f"答案 {i} " * (i % 5 + 1),
        }
        for i in range(number)
    ]


def write(folder: Path, form: str, rows: list[dict[str, Any]], name: str = "a") -> Path:
    """A file of the rows in a new folder; tables in groups of 100."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif form in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if form == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    return folder


def hashes(result: RecordsResult) -> list[bytes]:
    """The content hashes of all valid records, in their order."""
    tables = [read_arrow(Path(unit.path) / "records.arrow") for unit in result.units]
    return [one for table in tables for one in table["hash"].to_pylist()]


def rows_of(plan_dir: str) -> list[np.ndarray]:
    """The arrays of the training rows."""
    rows = open_plan(Path(plan_dir), "train").rows
    return [getattr(rows, name) for name in ("row_offsets", "shard", "example", "start", "length", "target_tokens")]
