"""Parquet, Arrow, CSV and saved data sets: the same records give the same content and the same plan as JSON does."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from data_prep.errors import CorpusError
from data_prep.pipeline import prepare
from data_prep.records import tables as tables_module
from data_prep.records.build_unit import RECORDS_FILE
from data_prep.records.shard import ledger_table, read_arrow, shard_records
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from tests.support import tables
from tests.support.tokenizers import bytes_core, save


def corpus(folder, **fields) -> CorpusSettings:
    fields = {"max_rejected_fraction": 1.0, "prepare_workers": 1, **fields}
    return CorpusSettings(instruction_tuning_data_dir=str(folder), pretraining_data_dir=None, **fields)


def lines(result) -> list[int]:
    return [line for unit in result.units for line in ledger_table(unit)["line"].to_pylist()]


def test_every_form_gives_the_same_content_and_the_same_plan(tmp_path):
    tokenizer = save(bytes_core(), tmp_path / "tokenizer", bos_token="<s>")
    plans, found = {}, {}
    for form in tables.FORMS:
        settings = corpus(tables.write(tmp_path / form, form, tables.records(300)))
        found[form] = shard_records(settings, tmp_path / "cache")
        pack = PackSettings(max_seq_length=256)
        plans[form] = prepare(settings, TokenizeSettings(), pack, tokenizer, tmp_path / "cache")
    for form in tables.FORMS[1:]:
        assert tables.hashes(found[form]) == tables.hashes(found["jsonl"])
        report = plans[form].report
        assert report["records_in"] == report["accepted"] == 300
        for ours, those_of_json in zip(*(tables.rows_of(plans[one].path) for one in (form, "jsonl")), strict=True):
            np.testing.assert_array_equal(ours, those_of_json)


def test_a_table_cut_into_parts_has_the_same_rows_and_numbers(tmp_path, monkeypatch):
    whole = {}
    for form in ("parquet", "arrow"):
        whole[form] = shard_records(corpus(tables.write(tmp_path / form, form, tables.records(950))), tmp_path / "c")
    monkeypatch.setattr("data_prep.records.files.SMALL_TABLE_BYTES", 0)
    monkeypatch.setattr(tables_module, "PART_BYTES", 20_000)
    for form, one in whole.items():
        cut = shard_records(corpus(tmp_path / form), tmp_path / "c")
        assert len(one.units) == 1 and len(cut.units) > 2
        assert tables.hashes(cut) == tables.hashes(one)
        assert lines(cut) == lines(one) == list(range(1, 951))


def test_an_arrow_file_with_a_table_of_contents_and_dictionaries(tmp_path):
    rows = tables.records(250)
    table = pa.Table.from_pylist(rows)
    coded = table.set_column(0, "instruction", table["instruction"].dictionary_encode())
    (tmp_path / "in").mkdir()
    with pa.ipc.new_file(str(tmp_path / "in" / "a.arrow"), coded.schema) as writer:
        writer.write_table(coded, max_chunksize=100)
    found = shard_records(corpus(tmp_path / "in"), tmp_path / "c")
    assert tables.hashes(found) == tables.hashes(
        shard_records(corpus(tables.write(tmp_path / "j", "jsonl", rows)), tmp_path / "c")
    )


def test_nested_columns_nulls_and_texts_that_are_not_utf8(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    tables.write(tmp_path / "in", "parquet", [{"messages": turns}, {"messages": None}])
    pq.write_table(pa.table({"input": bad, "target": ["x"]}), tmp_path / "in" / "b.parquet")
    found = shard_records(corpus(tmp_path / "in"), tmp_path / "c")
    assert (found.records, found.valid) == (3, 1)
    assert found.rejected["invalid_utf8"] == 1
    texts = read_arrow(f"{found.units[0].path}/{RECORDS_FILE}")["texts"].to_pylist()
    assert texts == [["a", "b"]]


def test_a_damaged_table_is_named(tmp_path):
    path = tables.write(tmp_path / "in", "parquet", tables.records(50)) / "a.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorpusError, match=r"a\.parquet: not readable as parquet.*write the file again"):
        shard_records(corpus(tmp_path / "in"), tmp_path / "c")


CSV = (
    b'\xef\xbb\xbfinput,target\r\na,b\r\n\r\n"two\r\nlines",c\r\n'
    b'"never closed,d\r\n"text"behind,e\r\none\r\n1,2,3\r\n\xff,f\r\ng,h'
)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_csv_cost_themselves_alone(tmp_path, packed):
    (tmp_path / "in").mkdir()
    name, data = ("a.csv.gz", gzip.compress(CSV)) if packed else ("a.csv", CSV)
    (tmp_path / "in" / name).write_bytes(data)
    found = shard_records(corpus(tmp_path / "in"), tmp_path / "c")
    table = ledger_table(found.units[0])
    assert found.rejected == {"malformed_row": 4, "invalid_utf8": 1}
    assert table["line"].to_pylist() == [2, 4, 6, 7, 8, 9, 10, 11]
    for start, length, line in zip(*(table[name].to_pylist() for name in ("offset", "length", "line")), strict=True):
        assert CSV[:start].count(b"\n") == line - 1
        assert CSV[start + length : start + length + 2] in (b"\r\n", b"")
    texts = read_arrow(f"{found.units[0].path}/{RECORDS_FILE}")["texts"].to_pylist()
    assert texts == [["a", "b"], ["two\r\nlines", "c"], ["g", "h"]]
    kept = (tmp_path / "c" / "records" / found.units[0].fingerprint / "quarantine.bin").read_bytes()
    assert kept == b'"never closed,d\n"text"behind,e\none\n1,2,3\n\xff,f\n'


def test_a_truncated_csv_and_headers_that_name_nothing(tmp_path):
    rows = "".join(f"{number},{number * 7919}\n" for number in range(5000))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv.gz").write_bytes(gzip.compress(f"input,target\n{rows}".encode())[:-9000])
    found = shard_records(corpus(tmp_path / "in"), tmp_path / "c")
    assert found.rejected["truncated_file"] == 1 and 0 < found.valid < 5000
    for header, said in (('"input,target', "not closed"), ("input,target,input", "names 'input' twice")):
        (tmp_path / "in" / "a.csv").write_text(f"{header}\na,b\n")
        with pytest.raises(CorpusError, match=rf"a\.csv: the first row.*{said}"):
            shard_records(corpus(tmp_path / "in"), tmp_path / "c")


def test_a_data_set_that_datasets_saved(tmp_path):
    rows = tables.records(40)
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "in" / "saved"), num_shards=2)
    found = shard_records(corpus(tmp_path / "in"), tmp_path / "c")
    assert (found.files, found.records, found.valid) == (2, 40, 40)
    assert found.units[0].source == "instruction/saved"
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(CorpusError, match=r"splits of a data set; give the one to train on: .*/d/train, .*/d/test"):
        shard_records(corpus(tmp_path / "d"), tmp_path / "c")
    assert shard_records(corpus(tmp_path / "d" / "train"), tmp_path / "c").records == 40
    state = json.loads((tmp_path / "d" / "train" / "state.json").read_text())
    (tmp_path / "d" / "train" / state["_data_files"][0]["filename"]).unlink()
    with pytest.raises(CorpusError, match=r"\.arrow is missing, which state\.json names"):
        shard_records(corpus(tmp_path / "d" / "train"), tmp_path / "c")
