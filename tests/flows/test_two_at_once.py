"""Runs at the same moment: no two of them write the same file."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load
from data_prep.sample import write_sample
from flows.parts import run_dir
from training.launch import ownership

AT_ONCE = 8


def at_once(function) -> list:
    """Results, or errors, of several runs that start together."""
    barrier = threading.Barrier(AT_ONCE)

    def call(_) -> object:
        barrier.wait()
        try:
            return function()
        except ConfigError as error:
            return error

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(call, range(AT_ONCE)))


@pytest.fixture
def as_processes(monkeypatch):
    """Threads that have a process id each, as the runs would."""
    monkeypatch.setattr(os, "getpid", threading.get_ident)


@pytest.mark.usefixtures("as_processes")
def test_each_run_has_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20250601-030000")
    settings = load({"output_dir": str(tmp_path)}).settings
    names = sorted(run.name for run in at_once(lambda: run_dir.create(settings)))
    first = "20250601-030000-panda-tiny"
    assert names == [first, *(f"{first}-{number}" for number in range(2, AT_ONCE + 1))]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.usefixtures("as_processes")
@pytest.mark.parametrize("empty_before", [True, False])
def test_one_of_several_gets_the_name_they_all_want(tmp_path, empty_before):
    if empty_before:
        (tmp_path / "mine").mkdir()
    settings = load({"output_dir": str(tmp_path), "run_name": "mine"}).settings
    ended = at_once(lambda: run_dir.create(settings))
    refused = [one for one in ended if isinstance(one, ConfigError)]
    assert len(refused) == AT_ONCE - 1
    assert "is there already; choose another name, or go on with it: --resume" in str(refused[0])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_name_whose_run_was_killed_before_it_began_can_be_had_again(tmp_path):
    """Nobody could go on with it: there is no configuration, and the name would be lost."""
    settings = load({"output_dir": str(tmp_path), "run_name": "mine"}).settings
    run = run_dir.create(settings)
    with ownership.owning(run.path), pytest.raises(ConfigError, match="is there already"):
        run_dir.create(settings)  # somebody is at work
    assert run_dir.create(settings).path == run.path
    (run.path / "owner.json").unlink()
    with pytest.raises(ConfigError, match="is there already"):
        run_dir.create(settings)  # somebody may be about to take the lock
    os.utime(run.path, (0, 0))
    assert run_dir.create(settings).path == run.path
    (run.path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="go on with it: --resume"):
        run_dir.create(settings)


@pytest.mark.usefixtures("as_processes")
def test_the_sample_corpus_is_written_once(tmp_path):
    at_once(lambda: write_sample(tmp_path / "dataset"))
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]
    assert len(list(Path(tmp_path).rglob("*.json*"))) == 3
