"""The guides, walked command by command: what they show is run, and every flag of PandaLLM's guide has its counterpart.

The documents hold the commands (fences marked `console`) and the files they use (fences whose first line names one).
Fast: every command is understood, and those that train nothing are run. Slow: those that train are run to their end, on
tiny stand-ins of the weights (`support/stand_ins.py`). Output shown below a command must be part of what it prints.
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.cli import configure
from configs.errors import ConfigError
from configs.settings import PandaSettings
from flows.cli.main import TRAIN_SWITCHES, VERBS
from tests.support import stand_ins

ROOT = Path(__file__).parents[1]
GUIDES = (
    "docs/zh/guide.md", "README.zh.md", "docs/how-to.md", "docs/zh/how-to.md", "docs/coming-from.md",
    "docs/how-it-works.md",
)  # fmt: skip
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"^# ([\w./-]+\.(?:yaml|py))\n")
STATED_BY_THE_GUIDE = """
python train.py --model llama-7b
python train.py --conf_path my.yaml
python train.py --instruction_tuning_data_dir my/instructions --pretraining_data_dir my/documents
python train.py --model llama-7b --ckpt_path pretrain/llama-7b
python train.py --model llama-7b --ckpt_path my-llama
python train.py --model llama-7b --ckpt_path chitanda/llama-panda-zh-7b-delta --learing_rate 2e-3 --num_train_epochs 2
python train.py --model llama-65b --use_lora --lora_r 64 --lora_alpha 16 --lora_dropout 0.05
python train.py --model llama-65b --use_quant
"""
FLAGS_OF_THE_GUIDE = """
model conf_path instruction_tuning_data_dir pretraining_data_dir num_workers prefetch_factor max_seq_length ckpt_path
per_gpu_train_batch_size per_gpu_eval_batch_size optimizer learning_rate lr_scheduler gradient_accumulation_steps
weight_decay adam_epsilon adam_betas max_grad_norm num_train_epochs max_steps warmup_proportion warmup_steps
bit_training use_lora lora_r lora_alpha lora_dropout use_quant
"""
OTHER_WORDS = {"champion", "chatml", "alpaca", "plain", "weight", "train", "_target_"}
"""Values, and keys of records, that stand in the column of our settings."""
TRAINS_NOTHING = {"--dry_run", "--print_config", "--learnig_rate"}


@dataclass(frozen=True)
class Shown:
    """A command of a document and the output shown below it."""

    command: str
    output: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command)

    @property
    def trains(self) -> bool:
        return self.words[1] == "train.py" and not TRAINS_NOTHING & set(self.words)


def commands(document: str) -> list[Shown]:
    """The commands of a document in its order."""
    found = []
    for kind, text in FENCE.findall((ROOT / document).read_text(encoding="utf-8")):
        if kind == "console":
            for block in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, *output = block.rstrip("\n").split("\n")
                found.append(Shown(command, tuple(output)))
    return found


def write_files(document: str, folder: Path) -> None:
    """The files a document shows."""
    for _, text in FENCE.findall((ROOT / document).read_text(encoding="utf-8")):
        if match := FILE_NAME.match(text):
            (folder / match.group(1)).write_text(text, encoding="utf-8")


ALL = list(dict.fromkeys(shown for document in GUIDES for shown in commands(document)))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guide")
    stand_ins.make(folder)
    for document in GUIDES:
        write_files(document, folder)
    (folder / "my" / "tables").mkdir(parents=True)
    (folder / "my" / "tables" / "pairs.tsv").write_text(
        "".join(f"{a} plus {b} is\t{a + b}\n" for a in range(9) for b in range(9)), encoding="utf-8"
    )
    (folder / "my" / "questions").mkdir()
    questions = [{"question_text": f"{a} plus {b} is", "reply": f"{a + b}"} for a in range(9) for b in range(9)]
    (folder / "my" / "questions" / "sums.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    (folder / "my" / "lines").mkdir()
    sums = [{"inputs": f"{a} plus {b} is", "targets": f"{a + b}"} for a in range(9) for b in range(9)]
    (folder / "my" / "lines" / "sums.txt").write_text("\n".join(map(json.dumps, sums)), encoding="utf-8")
    (folder / "my" / "pairs").mkdir()
    document = {"inputs": "", "targets": "Numbers can be added, and the order does not matter."}
    (folder / "my" / "pairs" / "partition_25.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "my" / "instructions").symlink_to(folder / "dataset" / "instruction_tuning")
    (folder / "my" / "documents").symlink_to(folder / "dataset" / "pretraining")
    return folder


def check(result, shown: Shown) -> None:
    printed = result.stdout + result.stderr
    assert result.returncode == (2 if shown.output[:1] and shown.output[0].startswith("error:") else 0), printed
    assert all(line in printed for line in shown.output), printed


def test_the_documents_show_every_command_of_the_guide():
    shown = {one.command for one in ALL}
    assert set(STATED_BY_THE_GUIDE.strip().split("\n")) <= shown
    assert len(ALL) > len(STATED_BY_THE_GUIDE.strip().split("\n"))


@pytest.mark.parametrize(
    "shown", [one for one in ALL if one.words[:2] == ["python", "train.py"]], ids=lambda one: one.command
)
def test_every_command_is_understood(shown, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    try:
        configure("train.py", "", shown.words[2:], TRAIN_SWITCHES)
    except ConfigError:
        assert shown.output, f"{shown.command} is an error, and the document does not show it"


def test_every_setting_that_another_one_is_translated_to_exists(workplace, monkeypatch):
    """In the last column of the tables: `name` is a setting, and of `name: value` the value is one it takes."""
    monkeypatch.chdir(workplace)
    rows = [line.split(" | ")[-1] for line in (ROOT / "docs/coming-from.md").read_text().splitlines() if "|" in line]
    codes = re.findall(r"`([a-z_]+)(?:: ([^`]+))?`", "\n".join(rows))
    settings = [(name, value) for name, value in codes if name not in OTHER_WORDS]
    assert len(settings) > 40
    for name, value in settings:
        assert name in PandaSettings.model_fields, name
        if value:
            configure("train.py", "", [f"{name}={value}"], TRAIN_SWITCHES)


def test_the_chinese_how_to_is_in_step_with_the_english_one():
    """The same ways in the same order: commands, files, and what is shown of code."""
    english, chinese = (ROOT / name for name in ("docs/how-to.md", "docs/zh/how-to.md"))
    assert commands("docs/how-to.md") == commands("docs/zh/how-to.md")
    counts = [len(re.findall(r"^## ", path.read_text(encoding="utf-8"), re.MULTILINE)) for path in (english, chinese)]
    assert counts[0] == counts[1] > 10
    indented = [
        re.findall(r"^    .*$", FENCE.sub("", path.read_text(encoding="utf-8")), re.M) for path in (english, chinese)
    ]
    assert indented[0] == indented[1] != []


def test_every_verb_exists():
    assert {one.words[1] for one in ALL if one.words[0] == "panda"} <= set(VERBS)


@pytest.mark.parametrize("shown", [one for one in ALL if not one.trains], ids=lambda one: one.command)
def test_a_command_that_trains_nothing(shown, workplace):
    check(stand_ins.run(workplace, shown.words), shown)


@pytest.mark.slow
@pytest.mark.usefixtures("use_prefect_server")
@pytest.mark.parametrize("shown", [one for one in ALL if one.trains], ids=lambda one: one.command)
def test_a_command_that_trains(shown, workplace):
    result = stand_ins.run(workplace, [*shown.words, *stand_ins.SHORT])
    check(result, shown)
    assert "Registered" in result.stdout


def table_rows(document: str) -> list[list[str]]:
    """The cells of every table row of a document, headings apart."""
    text = FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))
    rows = [line for line in text.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("| "))] for row in rows]


def test_the_table_has_no_empty_cell():
    rows = table_rows("docs/guide.md")
    assert len(rows) > 40
    assert all(cell for row in rows for cell in row)
    widths = {len(row) for row in rows}
    assert widths == {2, 3, 4}, "the guide has three columns, the keys of the plan two, the measured memory four"


def test_every_flag_of_the_guide_is_in_the_table_and_in_the_chinese_guide():
    table = "\n".join(" ".join(row) for row in table_rows("docs/guide.md"))
    chinese = (ROOT / "docs/zh/guide.md").read_text(encoding="utf-8")
    for flag in FLAGS_OF_THE_GUIDE.split():
        assert f"`--{flag}" in table, flag
        assert f"--{flag}" in chinese, flag


def test_relative_links_lead_somewhere():
    for document in ("docs/guide.md", *GUIDES):
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
            assert (ROOT / document).parent.joinpath(target).exists(), (document, target)
