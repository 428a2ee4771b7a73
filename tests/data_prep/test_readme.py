"""What data_prep/README.md shows is what happens: the way of one record, number by number, and its program."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import data_prep
from data_prep.pipeline import prepare
from data_prep.plan.ledger import LEDGER_FILE
from data_prep.plan.reader import open_plan
from data_prep.records.shard import read_arrow
from data_prep.sample import write_sample
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings

README = Path(data_prep.__file__).parent / "README.md"


def test_the_way_of_one_record(tmp_path, smollm2_dir):
    record = {"instruction": "Add.", "input": "1 1", "output": "2"}
    lines = ",\n  ".join(json.dumps(one) for one in (record, {"instruction": "no output"}, record))
    for kind, name, text in [
        ("i", "a.json", f"[\n  {lines}\n]\n"),
        ("p", "b.jsonl", '{"title": "Peter", "content": "A panda."}\n'),
    ]:
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_text(text)
    corpus = CorpusSettings(
        instruction_tuning_data_dir=str(tmp_path / "i"), pretraining_data_dir=str(tmp_path / "p"),
        validation_fraction=0, max_rejected_fraction=1, tombstones=None,
    )  # fmt: skip
    result = prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=16), smollm2_dir, tmp_path / "cache")
    ledger = read_arrow(Path(result.path) / LEDGER_FILE).to_pylist()
    batch = open_plan(Path(result.path), "train").batch(np.array([0]))
    readme = README.read_text()
    assert f"hash {ledger[0]['hash'].hex()[:8]}..." in readme
    assert f"line {ledger[0]['line']}, offset {ledger[0]['offset']}, accepted, train" in readme
    assert [entry["reason"] for entry in ledger] == [None, "missing_field", "duplicate", None]
    drawn = {
        line.split()[0]: line for line in readme.splitlines() if line.strip().startswith(("labels", "position_ids"))
    }
    drawn["input_ids"] = next(line for line in readme.splitlines() if line.startswith("    batch "))
    for name in ("input_ids", "labels", "position_ids"):
        numbers = drawn[name].replace("|", " ").split(name)[1].split()
        assert list(map(int, numbers)) == getattr(batch, name)[0].tolist()


def test_the_python_of_the_readme(tmp_path, bytes_dir):
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    write_sample(tmp_path / "sample")
    (tmp_path / "my").mkdir()
    (tmp_path / "sample" / "instruction_tuning").rename(tmp_path / "my" / "instructions")
    (tmp_path / "my-llama").symlink_to(bytes_dir)
    (tmp_path / "mine.py").write_text(program)
    environment = {"PYTHONPATH": str(README.parents[1]), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "mine.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, again, shape = done.stdout.strip().split(" ", 2)
    assert int(rows) == int(again) > 2
    assert re.fullmatch(r"\(2, \d+\)", shape)
