"""`_target_` nodes end to end: a project of the user, in the working directory, that nothing of ours names or installs.

The guide's ``read_tensor: {_target_: data.collators.zh_instruct.TextDatasetUnifyV3, pair_file_list: ...}`` is walked by
``tests/test_guide.py``; here are a generator as ``reader`` and the nodes of all other settings.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

MY_PROJECT = '''
"""All of it in one module; each function is one node."""
from transformers import LlamaConfig
import torch

def pairs(path, separator, quote=None):
    for line in open(path, encoding="utf-8"):
        question, answer = line.rstrip("\\n").split(separator)
        yield {"input": quote.upper() + question if quote else question, "target": answer}

def prefix(text):
    return text * 2

def template(record, tag):
    for turn in record:
        yield f"{tag}{turn['role']}:", False, True
        yield turn["content"], turn["role"] == "assistant"

def optimizer(params, lr, momentum):
    return torch.optim.SGD(params, lr=lr, momentum=momentum)

def schedule(total_steps, floor):
    return lambda step: max(floor, 1 - step / total_steps)

def architecture(width, **special):
    return LlamaConfig(hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=2, **special)

def log_loss(record, file):
    with open(file, "a") as stream:
        stream.write(f"{record['step']} {record['loss']:.3f}\\n")
'''

MINE = """
instruction_tuning_data_dir: ./tables
pretraining_data_dir: null
reader:
  _target_: my_project.readers.pairs
  separator: "\\t"
  quote: {_target_: my_project.readers.prefix, text: q}
template: {_target_: my_project.readers.template, tag: "@"}
optimizer: {_target_: my_project.readers.optimizer, momentum: 0.9}
lr_scheduler: {_target_: my_project.readers.schedule, floor: 1e-1}
architecture: {_target_: my_project.readers.architecture, width: 32}
callbacks:
  - {_target_: my_project.readers.log_loss, file: losses.txt}
"""

WALK = """
import json, sys
from pathlib import Path
from configs.load import load
settings = load(conf_path="mine.yaml").settings
assert "my_project" not in sys.modules, "loading a configuration runs nothing of the user's"
assert settings.architecture == {"_target_": "my_project.readers.architecture", "width": 32}

from data_prep.pipeline import prepare
from data_prep.records.shard import shard_records
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokenizer import load_tokenizer, train_tokenizer
from data_prep.plan.reader import open_plan
corpus, cache = CorpusSettings.of(settings), Path("cache")
records = shard_records(corpus, cache)
tokenizer = train_tokenizer(records, 300, cache)
report = prepare(corpus, TokenizeSettings.of(settings), PackSettings.of(settings), tokenizer, cache)
plan = open_plan(Path(report.path), "train")
ids = plan.batch([0]).input_ids[0]
text = load_tokenizer(tokenizer, cache).core.decode(ids.tolist())

from training.models.build import config_of
from training.engines.optimizers import build_optimizer
from training.trainer.schedule import schedule
from training.settings import OptimizerSettings
from data_prep.targets import load_target
import torch
chosen = OptimizerSettings.of(settings)
optimizer = build_optimizer(torch.nn.Linear(2, 2).named_parameters(), chosen)
config = config_of({**settings.architecture, "vocab_size": 300})
load_target(settings.callbacks[0], "callbacks")({"step": 1, "loss": 2.5})
print(json.dumps({
    "records": records.valid, "text": text, "optimizer": [type(optimizer).__name__, optimizer.defaults["momentum"]],
    "factors": [schedule(chosen, 10)(step) for step in (0, 5, 10)], "config": [config.hidden_size, config.vocab_size],
}))
"""


def project(folder: Path) -> None:
    (folder / "my_project").mkdir()
    (folder / "my_project" / "readers.py").write_text(MY_PROJECT, encoding="utf-8")
    (folder / "mine.yaml").write_text(MINE, encoding="utf-8")
    (folder / "tables").mkdir()
    lines = [f"多少是 {i}？\t{i} 个" for i in range(40)]
    (folder / "tables" / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def walk(folder: Path) -> subprocess.CompletedProcess:
    """Run as an installed command would: our packages on the path, the working directory not."""
    (folder.parent / "walk.py").write_text(WALK, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(folder.parent / "walk.py")], cwd=folder, env=environment, check=False,
        capture_output=True, text=True,
    )  # fmt: skip


def test_every_kind_of_node(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    project(folder)
    result = walk(folder)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["records"] == 40
    assert "@user:QQ多少是" in found["text"]
    assert "@assistant:" in found["text"]
    assert found["optimizer"] == ["SGD", 0.9]
    assert found["factors"] == [1.0, 0.5, 0.1]
    assert found["config"] == [32, 300]
    assert (folder / "losses.txt").read_text() == "1 2.500\n"


def test_a_module_that_is_nowhere(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    project(folder)
    (folder / "my_project" / "readers.py").rename(folder / "elsewhere.py")
    result = walk(folder)
    assert result.returncode == 1
    assert "reader: no module my_project.readers" in result.stderr
    assert f"modules are looked for on PYTHONPATH and in the working directory ({folder})" in result.stderr
