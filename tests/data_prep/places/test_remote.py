"""Corpora at addresses, on file systems of fsspec that need no server: parts, resumption, replacement, secrets."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import fsspec
import pytest

from data_prep.errors import CorpusError
from data_prep.places import address as address_module
from data_prep.places import download
from data_prep.places.address import list_files, problem_of, without_secrets
from data_prep.places.download import RemoteFile
from data_prep.records import files as files_module
from data_prep.records.shard import ledger_table, shard_records
from data_prep.settings import CorpusSettings
from tests.support import tables


def corpus(address: str, **fields) -> CorpusSettings:
    return CorpusSettings(
        instruction_tuning_data_dir=address, pretraining_data_dir=None, max_rejected_fraction=1.0, prepare_workers=1,
        **fields,
    )  # fmt: skip


def kept(cache: Path) -> list[str]:
    return [path.name for path in (cache / "remote").glob("*/*") if path.name != "pieces.json"]


@pytest.fixture
def requests(monkeypatch) -> list[tuple[int, int]]:
    """The ranges that are read of remote files, in their order."""
    seen: list[tuple[int, int]] = []
    read = address_module.read_range

    def noted(address: str, start: int, stop: int) -> bytes:
        seen.append((start, stop))
        return read(address, start, stop)

    monkeypatch.setattr(download, "read_range", noted)
    monkeypatch.setattr(address_module, "read_range", noted)
    return seen


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_remote_corpus_gives_what_a_local_one_gives(tmp_path, monkeypatch, requests, form):
    """Cut into parts and fetched in several waves; the same again reads nothing, and nothing is kept."""
    monkeypatch.setattr(files_module, "PART_BYTES", 4096)
    monkeypatch.setattr(files_module, "WAVE_BYTES", 8192)
    monkeypatch.setattr("data_prep.records.tables.PART_BYTES", 20_000)
    monkeypatch.setattr(files_module, "SMALL_TABLE_BYTES", 0)
    folder = tables.write(tmp_path / "in", form, tables.records(400))
    tables.write(folder / "sub", form, tables.records(10))
    here = shard_records(corpus(str(folder)), tmp_path / "here")
    there = shard_records(corpus(f"file://{folder}"), tmp_path / "there")
    assert [unit.fingerprint for unit in there.units] == [unit.fingerprint for unit in here.units]
    assert [unit.source for unit in there.units] == [unit.source for unit in here.units]
    assert {file.path for unit in there.units for file in unit.files} == {
        f"file://{folder}/a.{form}", f"file://{folder}/sub/a.{form}",
    }  # fmt: skip
    assert ledger_table(there.units[-1])["line"].to_pylist() == ledger_table(here.units[-1])["line"].to_pylist()
    assert kept(tmp_path / "there") == [] and requests
    requests.clear()
    again = shard_records(corpus(f"file://{folder}"), tmp_path / "there")
    assert again.reused == len(again.units) and requests == []


def test_a_killed_download_goes_on(tmp_path, requests):
    data = os.urandom(50_000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(data)
    program = f"""
        import os, signal
        from data_prep.places import download
        from data_prep.places.address import list_files
        file, = list_files("file://{tmp_path}/in")
        download.BLOCK_BYTES = 10_000
        read = download.read_range
        def dying(address, start, stop):
            if start == 30_000:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(address, start, stop)
        download.read_range = dying
        download.RemoteFile(file.address, file.version, file.size, "{tmp_path}").fetch()
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (file,) = list_files(f"file://{tmp_path}/in")
    remote = RemoteFile(file.address, file.version, file.size, str(tmp_path))
    assert remote.fetch().read_bytes() == data
    assert requests == [(30_000, 50_000)]


def test_a_file_that_is_replaced_while_it_is_read_is_named(tmp_path, monkeypatch):
    folder = tables.write(tmp_path / "in", "jsonl", tables.records(400))
    (file,) = list_files(f"file://{folder}")
    remote = RemoteFile(file.address, file.version, file.size, str(tmp_path / "c"))
    monkeypatch.setattr(download, "BLOCK_BYTES", 4096)
    read = address_module.read_range

    def replaced(address: str, start: int, stop: int) -> bytes:
        data = read(address, start, stop)
        if start == 8192:
            (tmp_path / "new").write_bytes((folder / "a.jsonl").read_bytes()[::-1])
            (tmp_path / "new").replace(folder / "a.jsonl")
        return data

    monkeypatch.setattr(download, "read_range", replaced)
    with pytest.raises(CorpusError, match=rf"file://{folder}/a\.jsonl was replaced while it was read \(it was .*, now"):
        remote.fetch()
    assert [path.stat().st_size for path in remote.folder.iterdir()] == [8192]  # nothing of the new one


def test_a_new_version_is_read_again(tmp_path):
    folder = tables.write(tmp_path / "in", "jsonl", tables.records(20))
    assert shard_records(corpus(f"file://{folder}"), tmp_path / "c").records == 20
    tables.write(tmp_path / "new", "jsonl", tables.records(30))
    (tmp_path / "new" / "a.jsonl").replace(folder / "a.jsonl")
    assert shard_records(corpus(f"file://{folder}"), tmp_path / "c").records == 30


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("https://user:hunter2@host/folder", "https://host/folder: it holds a password"),
        ("https://host/folder?X-Signature=hunter2", "https://host/folder: it holds a query"),
        ("zip://a.json::s3://bucket/a.zip", "chains of file systems"),
        ("nonsense://bucket", "nonsense"),
        ("gs://bucket/folder", r"gs://bucket/folder: .*pip install 'panda-train\[gcs\]'"),
    ],
)
def test_addresses_that_are_not_read(tmp_path, address, said):
    with pytest.raises(CorpusError, match=said) as caught:
        shard_records(corpus(address), tmp_path / "c")
    assert "hunter2" not in str(caught.value)


def test_what_a_server_says_is_told_without_its_signatures(monkeypatch):
    def refuse(*_, **__):
        raise OSError("403 for url https://cdn/a?Signature=hunter2&Expires=1")

    monkeypatch.setattr(fsspec.filesystem("memory"), "find", refuse)
    with pytest.raises(CorpusError, match=r"memory://x: OSError: 403 for url https://cdn/a\?\.\.\.") as caught:
        list_files("memory://x")
    assert "hunter2" not in str(caught.value)


def test_places_that_are_not_there(tmp_path):
    with pytest.raises(CorpusError, match=r"Nothing to read:\n--instruction_tuning_data_dir: memory://empty holds no"):
        shard_records(corpus("memory://empty"), tmp_path)
    with pytest.raises(CorpusError, match="reads files of this machine; memory://x is an address"):
        shard_records(corpus("memory://x", reader={"_target_": "tests.support.own_code.x"}), tmp_path)


def test_secrets_in_addresses():
    assert problem_of("s3://bucket/a@b:c") is None
    assert without_secrets("ftp://me:hunter2@host:21/a/b?c") == "ftp://host:21/a/b"


def test_a_saved_data_set_at_an_address(tmp_path):
    from datasets import Dataset

    Dataset.from_list(tables.records(20)).save_to_disk(str(tmp_path / "in"))
    found = shard_records(corpus(f"file://{tmp_path}/in"), tmp_path / "c")
    assert (found.files, found.valid) == (1, 20)
    known = [json.loads(path.read_text()) for path in (tmp_path / "c" / "remote").glob("*/pieces.json")]
    assert len(known) == 1 and known[0]["address"].endswith(".arrow")
