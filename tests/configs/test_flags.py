"""Flags: the guide's spellings, and every problem named with the value, the range and the nearest name."""

import subprocess
import sys

import pytest

from configs.cli import CONF_PATH, JSON, configure
from configs.errors import ConfigError
from configs.settings import PandaSettings, fields_by_group

HEAVY = {"torch", "transformers", "prefect", "mlflow", "numpy", "pyarrow", "deepspeed", "tokenizers", "huggingface_hub"}
ARGV = """--learnig_rate 2e-3 --lora_r 0 --model lama-7b --preset lor foo_bar=1 --lora_dropout lora_alpha=[
warmup_steps=1,2 --optimizer SGD --zero_stage 7 --mixture {instruction:2}"""
TEXT = """unknown flag --learnig_rate; did you mean --learning_rate?
--mixture {instruction:2}: a key without a value; write {key: value} with a space after the colon, in quotes
--lora_dropout needs a value: a number >= 0 and < 1
unknown setting 'foo_bar' (override)
lora_alpha=[: no viable alternative at input '['; a value with special characters needs quotes: key='"a(b)"'
warmup_steps=1,2: several values; one run takes one, and a list is written [1,2]
unknown model 'lama-7b'; did you mean llama-7b?; a directory or a hub id (owner/name) works as well
preset=lor: must be one of lora, qlora, full; did you mean lora? (flag)
lora_r=0: must be a whole number >= 1 (flag)
optimizer=SGD: use one of AdamW, LAMB, Adafactor, or a `_target_` node (flag)
zero_stage=7: must be one of 0, 1, 2, 3 (flag)"""
ALL_KINDS, PROBLEMS = ARGV.split(), TEXT.split("\n")


def values(*argv: str):
    return configure("train.py", "", list(argv), [CONF_PATH, JSON])[1].settings


def problems(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        values(*argv)
    return caught.value.problems


def test_a_model_longer_than_any_path_is_unknown():
    assert problems("--model", "a" * 5000)[0].startswith("unknown model 'aaa")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--use_lora", {"use_lora": True}),
        ("--use_lora true", {"use_lora": True}),
        ("--use_lora false", {"use_lora": False}),
        ("--use_lora=true --lora_r 4", {"use_lora": True, "lora_r": 4}),
        ("--preset lora --use_lora false", {"use_lora": False, "lora_r": 16}),
        ("--adam_betas 0.9 0.95 lora_r=4", {"adam_betas": (0.9, 0.95), "lora_r": 4}),
        ("--adam_betas 0.9,0.95", {"adam_betas": (0.9, 0.95)}),
        ("--adam_betas (0.9,0.95)", {"adam_betas": (0.9, 0.95)}),
        ("--max_steps -1 --learning_rate 2e-3", {"max_steps": -1, "learning_rate": 0.002}),
        ("--zero_stage 3 --optimizer adamw", {"zero_stage": 3, "optimizer": "AdamW"}),
        ("--pretraining_data_dir none --deduplicate none", {"pretraining_data_dir": None, "deduplicate": "none"}),
        ("--lora_target_modules q_proj v_proj", {"lora_target_modules": ["q_proj", "v_proj"]}),
        ("architecture.hidden_size=64 seed=7", {"seed": 7}),
        ("optimizer={_target_:my.module.make,eps:1e-8}", {"optimizer": {"_target_": "my.module.make", "eps": 1e-8}}),
    ],
)
def test_values(argv, expected):
    settings = values(*argv.split())
    assert {name: getattr(settings, name) for name in expected} == expected


def test_mappings_are_yaml_with_hydras_numbers():
    settings = values("--mixture", "{instruction: 2, pretraining: 0.5}", "--optimizer", "{_target_: a.b, eps: 1e-8}")
    assert settings.mixture == {"instruction": 2, "pretraining": 0.5}
    assert settings.optimizer == {"_target_": "a.b", "eps": 1e-8}


def test_all_problems_at_once():
    assert sorted(problems(*ALL_KINDS)) == sorted(PROBLEMS)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ("stray", "'stray' is neither a flag nor a key=value override"),
        ("--use_lora maybe", "use_lora=maybe: must be true or false (flag)"),
        ("--adam_betas 0.9", "adam_betas=['0.9']: must be 2 values, each a number >= 0 and < 1 (flag)"),
        ("lora_r=1.5", "lora_r=1.5: must be a whole number >= 1 (override)"),
        ("learning_rte=1", "unknown setting 'learning_rte'; did you mean learning_rate? (override)"),
        ("--optimizer {_target_:x}", "--optimizer {_target_:x}: a key without a value; write {key: value} with a space"
         " after the colon, in quotes"),
        ("optimizer={eps:1}", "optimizer={'eps': 1}: a node names its function as `_target_: package.module.function`"
         " (override)"),
        ("--warmup_steps 4 --warmup_proportion 0.1", "warmup_steps=4 and warmup_proportion=0.1 contradict each other;"
         " set one of them to 0"),
    ],
)  # fmt: skip
def test_one_problem(argv, problem):
    assert problems(*argv.split()) == [problem]


def test_every_setting_is_a_flag_described_once():
    listed = [name for names in fields_by_group().values() for name in names]
    assert sorted(listed) == sorted(PandaSettings.model_fields)
    assert all(info.description for info in PandaSettings.model_fields.values())


def run_train(*argv: str) -> subprocess.CompletedProcess:
    """`python train.py`, then on the last line of stderr the heavy modules it imported."""
    code = (
        "import sys\nfrom flows.cli.main import train_main\ntry:\n    code = train_main(sys.argv[1:])\n"
        "except SystemExit as end:\n    code = end.code or 0\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\nsys.exit(code)"
    )
    return subprocess.run([sys.executable, "-c", code, *argv], check=False, capture_output=True, text=True)


def test_help_shows_values_and_origins_and_imports_nothing_heavy():
    result = run_train("--model", "llama-7b", "--preset", "lora", "--help")
    text = " ".join(result.stdout.split())
    assert result.returncode == 0
    assert result.stderr.splitlines()[-1] == "[]"
    for title, names in fields_by_group().items():
        assert f"{title}:" in result.stdout
        assert all(f"--{name} " in result.stdout for name in names)
    assert "--lora_r N Rank of the adapter. (a whole number >= 1) [16; preset/lora.yaml]" in text
    assert "--ckpt_path" in text
    assert "[huggyllama/llama-7b; model/llama-7b.yaml]" in text
    assert "[0.05; default]" in text


def test_a_configuration_error_imports_nothing_heavy():
    result = run_train(*ALL_KINDS)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "[]"
    assert result.stderr.startswith(f"error: configuration: {len(PROBLEMS)} problems\n  - {PROBLEMS[0]}")
