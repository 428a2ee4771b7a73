"""The matrix of settings: what is refused, why, and that everything else is let through."""

import itertools
import subprocess
import sys

import pytest

from training.errors import CompatibilityError
from training.planning.compatibility import RULES, check, problems, recurrent_parts
from training.settings import TrainSettings

LLAMA = {"model_type": "llama"}


@pytest.mark.parametrize(
    ("settings", "config", "reason"),
    [
        ({"use_quant": True}, LLAMA, "add --use_lora"),
        ({"use_lora": True}, None, "give --ckpt_path"),
        ({"use_lora": True, "use_quant": True, "zero_stage": 3}, LLAMA, "--zero_stage 2"),
        ({"use_lora": True, "use_quant": True, "strategy": "fsdp"}, LLAMA, "--strategy deepspeed"),
        ({"offload_parameters": True, "zero_stage": 2}, LLAMA, "--zero_stage 3"),
        ({"offload_optimizer": True, "zero_stage": 0}, LLAMA, "--zero_stage 2"),
        ({"offload_optimizer": True, "strategy": "fsdp"}, LLAMA, "--strategy deepspeed"),
        ({"optimizer": "LAMB", "zero_stage": 2}, LLAMA, "--zero_stage 0 or --strategy fsdp"),
        ({"optimizer": "Adafactor", "zero_stage": 1}, LLAMA, "--zero_stage 0"),
        ({"optimizer": "Adafactor", "strategy": "fsdp"}, LLAMA, "--zero_stage 0"),
        ({"bit_training": True, "zero_stage": 2}, LLAMA, "--zero_stage 0"),
        ({"bit_training": True, "optimizer": "Adafactor", "zero_stage": 0}, LLAMA, "--optimizer AdamW or LAMB"),
        ({"use_nvlamb": True}, LLAMA, "--optimizer LAMB without --bit_training"),
        ({"attention": "flash_attention_2", "precision": "float32"}, LLAMA, "--attention auto"),
        ({}, {"model_type": "mamba2"}, "--packing false"),
        ({}, {"model_type": "new", "layer_types": ["full_attention", "linear_attention"]}, "--packing false"),
    ],
)
def test_refused_with_the_way_out(settings, config, reason):
    found = problems(TrainSettings(**settings), config, packing=True)
    assert any(reason in line for line in found), found


def test_every_rule_has_a_case_above():
    cases = test_refused_with_the_way_out.pytestmark[0].args[1]
    hit = {
        line.split(":")[0]
        for settings, config, _ in cases
        for line in problems(TrainSettings(**settings), config, True)
    }
    assert hit == {rule.what for rule in RULES}


def test_all_engines_and_modes_that_are_tested_to_work_are_let_through():
    for (lora, quant), stage in itertools.product([(False, False), (True, False), (True, True)], (0, 1, 2, 3)):
        if not (quant and stage == 3):
            settings = TrainSettings(use_lora=lora, use_quant=quant, zero_stage=stage)
            assert problems(settings, LLAMA, True) == []
    assert problems(TrainSettings(strategy="fsdp", optimizer="LAMB", use_nvlamb=True), LLAMA, True) == []
    assert problems(TrainSettings(), {"model_type": "mamba"}, packing=False) == []


def test_all_problems_are_listed_at_once(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    with pytest.raises(CompatibilityError, match=r"add --use_lora.*--packing false"):
        check(TrainSettings(use_quant=True), str(tmp_path), packing=True)


def test_recurrent_parts_of_nested_configs():
    assert recurrent_parts({"text_config": {"layer_types": ["conv", "full_attention"]}}) == ["conv"]
    assert recurrent_parts({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}) == []


def test_the_matrix_needs_no_torch():
    code = "import sys, training.planning.compatibility; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
