"""kill -9 at any moment, then the same command; two preparations at once: identical bytes, in real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import store

SCRIPT = """
import sys
from pathlib import Path
from data_prep.pipeline import prepare
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
if __name__ == "__main__":
    data, tokenizer, cache = sys.argv[1:]
    corpus = CorpusSettings(instruction_tuning_data_dir=data, pretraining_data_dir=None, prepare_workers=1)
    print(prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=128), Path(tokenizer), Path(cache)).path)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 files in 12 units, each about 1 MB: long enough to be killed in the middle."""
    directory = tmp_path_factory.mktemp("data")
    for number in range(12):
        records = ({"input": f"question {number} {i}", "target": f"answer {i} " * 12} for i in range(6000))
        (directory / f"{number:02}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


@pytest.fixture(scope="module")
def undisturbed(data, bytes_dir, tmp_path_factory):
    cache = tmp_path_factory.mktemp("undisturbed")
    assert start(data, bytes_dir, cache).wait() == 0
    return contents(cache)


def start(data, tokenizer, cache):
    command = [sys.executable, "-c", SCRIPT, str(data), str(tokenizer), str(cache)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def contents(cache: Path) -> dict[str, str]:
    return {
        str(path.relative_to(cache)): store.hash_file(path) for path in sorted(cache.glob("*/*/*")) if path.is_file()
    }


@pytest.mark.parametrize("moment", ["records", "tokens", "plans"])
def test_kill_and_again(data, bytes_dir, undisturbed, tmp_path, moment):
    process = start(data, bytes_dir, tmp_path)
    wait_for(tmp_path / moment, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.parent.name for path in tmp_path.rglob("manifest.json") if not path.parent.name.startswith(".")}
    assert start(data, bytes_dir, tmp_path).wait() == 0
    assert contents(tmp_path) == undisturbed  # no rest of the killed one either
    assert before <= {path.parent.name for path in tmp_path.rglob("manifest.json")}


def wait_for(directory: Path, process: subprocess.Popen) -> None:
    """Until something is being written there."""
    deadline = time.monotonic() + 120
    while not (directory.exists() and any(directory.iterdir())) and process.poll() is None:
        assert time.monotonic() < deadline, f"nothing in {directory}"
        time.sleep(0.002)


def test_two_at_once(data, bytes_dir, undisturbed, tmp_path):
    both = [start(data, bytes_dir, tmp_path) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert contents(tmp_path) == undisturbed
