"""A disk that is full, or is none: one clear error, nothing half valid; when there is room the same command goes on."""

import contextlib
import json
import resource
import shutil

import pytest

from data_prep import store
from flows.cli.main import main


@contextlib.contextmanager
def full_beyond(size: int):
    """No file can become longer: the kernel refuses in the middle of a file, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def words(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    records = [{"input": f"question {number}", "target": f"answer {number}" * 5} for number in range(500)]
    (folder / "a.json").write_text(json.dumps(records))
    return ["prepare", "--instruction_tuning_data_dir", str(folder), "--pretraining_data_dir", "null", "--cache_dir"]


def test_full_in_every_stage_and_then_on(words, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert main([*words, str(cache)]) == 0
    for stage in ("records", "tokenizers", "tokens", "plans"):
        shutil.rmtree(cache / stage)
        with full_beyond(20_000):
            assert main([*words, str(cache)]) == 2, stage
        said = capsys.readouterr().err
        assert "File too large; make room, or name a directory on another disk; then run the same again" in said
        assert not store.verify_cache(cache).damaged and not list(cache.glob("*/.building-*"))
        assert main([*words, str(cache)]) == 0, stage


def test_a_file_in_the_place_of_the_cache(words, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main([*words, str(cache)]) == 2
        assert "name a directory, this is a file or below one" in capsys.readouterr().err
