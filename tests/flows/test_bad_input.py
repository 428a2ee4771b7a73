"""A user's mistake gives one clear message that names the thing and the fix, exit code 2, and no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import warm

ROOT = Path(__file__).parents[2]


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run train.py as a user would, from another directory."""
    return warm.run([sys.executable, str(ROOT / "train.py"), *arguments], folder, timeout=600)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text('[{"input": "a", "target": "b"}]')
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    return tmp_path


MISTAKES = {
    "misspelt flag": (["--learnig_rate", "1"], ["--learnig_rate", "did you mean --learning_rate"]),
    "stray word": (["llama-7b"], ["'llama-7b'", "neither a flag nor"]),
    "several wrong values": (
        ["--learning_rate", "-1", "--max_seq_length", "x"],
        ["learning_rate=-1: must be a number > 0", "max_seq_length=x: must be a whole number >= 8"],
    ),
    "unknown model": (["--model", "lama-7b"], ["'lama-7b'", "did you mean llama-7b"]),
    "unknown preset": (["--preset", "lorra"], ["preset=lorra", "one of lora, qlora, full", "did you mean lora"]),
    "two kinds of warm-up": (["--warmup_steps", "3", "--warmup_proportion", "0.1"], ["contradict"]),
    "no corpus anywhere": (["--model", "llama-7b"], ["no corpus", "--instruction_tuning_data_dir"]),
    "missing corpus": (["--instruction_tuning_data_dir", "nowhere"], ["'nowhere'", "does not exist"]),
    "empty corpus": (["--instruction_tuning_data_dir", "empty"], ["'empty'", "is empty"]),
    "missing file of settings": (["--conf_path", "none.yaml"], ["none.yaml"]),
    "no such checkpoint": (
        ["--ckpt_path", "/no/where", "--pretraining_data_dir", "nix"],
        ["2 problems", "'nix'", "no directory /no/where; not a hub id"],
    ),
    "half a checkpoint": (["--ckpt_path", "half", "--instruction_tuning_data_dir", "data"], ["no .safetensors"]),
    "output below a file": (
        ["--instruction_tuning_data_dir", "data", "--output_dir", "data/a.json/out"], ["output_dir", "not writable"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_message_without_traceback(corpus, name):
    arguments, expected = MISTAKES[name]
    done = train(corpus, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert all(text in done.stderr for text in expected), done.stderr
    assert not done.stdout
    assert not (corpus / "outputs").exists()


@pytest.mark.usefixtures("use_prefect_server")
def test_no_usable_record(corpus):
    (corpus / "data" / "a.json").write_text('[{"input": "a", "target": ""}, {"input": 1}]')
    done = train(corpus, "--instruction_tuning_data_dir", "data", "--pretraining_data_dir", "null")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert "a.json" in done.stderr.split("error: ")[1]
    assert not list((corpus / "outputs").glob("*/summary.json"))


def test_approval_that_nobody_could_give(corpus, monkeypatch):
    """Without a server the run would train, ask a temporary one that has no UI, and wait for a day."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    done = train(corpus, "--model", "panda-tiny", "--instruction_tuning_data_dir", "data", "--require_approval")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "require_approval=true: no Prefect server at http://127.0.0.1:9/api" in done.stderr
    assert "panda up" in done.stderr
