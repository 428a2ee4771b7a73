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
        ({"add_tokens": ["<a>"]}, None, "or give --ckpt_path"),
        ({"use_lora": True, "use_quant": True, "init_lora_weights": "pissa"}, LLAMA, "one of the two"),
        (
            {"use_dora": True, "loraplus_lr_ratio": 4},
            LLAMA,
            "use_dora=True, loraplus_lr_ratio=4.0 would change nothing",
        ),
        ({"use_lora": True, "trainable_token_indices": [64]}, {**LLAMA, "vocab_size": 64}, "there is no row 64"),
        ({"compile": True, "zero_stage": 3}, LLAMA, "--strategy fsdp, or --zero_stage 2"),
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
        ({}, {**LLAMA, "max_position_embeddings": 32}, "--max_seq_length 32"),
        ({}, {"model_type": "mixtral", "num_local_experts": 8}, "--use_lora --lora_target_modules"),
        ({}, {"model_type": "new", "layer_types": ["full_attention", "linear_attention"]}, "--packing false"),
    ],
)
def test_refused_with_the_way_out(settings, config, reason):
    found = problems(TrainSettings(**settings), config, packing=True, max_seq_length=64)
    assert any(reason in line for line in found), found


def test_every_rule_has_a_case_above():
    cases = test_refused_with_the_way_out.pytestmark[0].args[1]
    hit = {
        line.split(":")[0]
        for settings, config, _ in cases
        for line in problems(TrainSettings(**settings), config, True, 64)
    }
    assert hit == {rule.what for rule in RULES}


def test_all_engines_and_modes_that_are_tested_to_work_are_let_through():
    for (lora, quant), stage in itertools.product([(False, False), (True, False), (True, True)], (0, 1, 2, 3)):
        settings = TrainSettings(use_lora=lora, use_quant=quant, zero_stage=stage)
        assert problems(settings, LLAMA, True) == []
        assert problems(TrainSettings(use_lora=lora, use_quant=quant, strategy="fsdp"), LLAMA, True) == []
    kinds = {"use_rslora": True, "use_dora": True, "modules_to_save": ["lm_head"], "trainable_token_indices": [1]}
    assert problems(TrainSettings(use_lora=True, loraplus_lr_ratio=2, **kinds), LLAMA, True) == []
    assert problems(TrainSettings(strategy="fsdp", optimizer="LAMB", use_nvlamb=True), LLAMA, True) == []
    assert problems(TrainSettings(), {"model_type": "mamba"}, packing=False) == []


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        (  # Qwen2.5 with YaRN: the scaled length stands nowhere
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (  # Llama 3.1: it is stated
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            },
            131072,
        ),
    ],
)
def test_rows_longer_than_the_positions_a_model_knows(config, limit):
    assert problems(TrainSettings(), config, True, max_seq_length=limit) == []
    said = problems(TrainSettings(), config, True, max_seq_length=limit + 1)
    assert len(said) == 1 and f"max_seq_length={limit + 1}" in said[0] and f"--max_seq_length {limit}," in said[0]


def test_adapters_on_a_mixture_of_experts_are_trained():
    mixture = {"model_type": "mixtral", "num_local_experts": 8}
    assert problems(TrainSettings(use_lora=True, lora_target_modules=["q_proj", "v_proj"]), mixture, True) == []
    for on_router in (None, ["q_proj", "gate"], ["model.layers.0.mlp.router"]):
        (said,) = problems(TrainSettings(use_lora=True, lora_target_modules=on_router), mixture, True)
        assert "8 experts" in said
    whole = TrainSettings(use_lora=True, lora_target_modules=["q_proj"], modules_to_save=["gate"])
    assert "8 experts" in problems(whole, mixture, True)[0]
    assert problems(TrainSettings(), {"model_type": "llama", "num_local_experts": 1}, True) == []


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
