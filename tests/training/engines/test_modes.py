"""Every way to train, for real on two ranks (and one): the same global batch gives the same losses and weights.

The runs of a number of ranks share their processes (`tests.support.many`), so the whole file costs two starts.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support import tiny

pytestmark = pytest.mark.distributed

ARCHITECTURE = {**tiny.ARCHITECTURE, "hidden_size": 64, "intermediate_size": 128}
LORA = {"use_lora": True, "lora_r": 4, "learning_rate": 0.005}
QUANT = {**LORA, "use_quant": True}
CONTINUED = {"save_steps": 3, "keep_last": 5}  # checkpoints after steps 3 and 6

# (ranks, micro-batch, accumulation): splits of one global batch of 8 rows
SPLITS = [(1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8), (2, 1, 4)]
ENGINES = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero2-offload": {"zero_stage": 2, "offload_optimizer": True},
    "zero3-offload": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    "zero2-recompute": {"zero_stage": 2, "gradient_checkpointing": True},
    "fsdp": {"strategy": "fsdp"},
    "fsdp-recompute": {"strategy": "fsdp", "gradient_checkpointing": True},
}
UNTIED = {**ARCHITECTURE, "tie_word_embeddings": False}
UNTIED_ENGINES = {"untied-zero0": {"zero_stage": 0}, "untied-fsdp": {"strategy": "fsdp"}}
LORAS = {
    "lora-zero0": {**LORA, "zero_stage": 0},
    "lora-zero2": {**LORA, "zero_stage": 2},
    "lora-zero3": {**LORA, "zero_stage": 3},
    "lora-fsdp": {**LORA, "strategy": "fsdp"},
    "qlora-zero0": {**QUANT, "zero_stage": 0},
    "qlora-zero2": {**QUANT, "zero_stage": 2, "gradient_checkpointing": True},
    "qlora-zero3": {**QUANT, "zero_stage": 3},
    "qlora-fsdp": {**QUANT, "strategy": "fsdp"},
}
OPTIMIZERS = {
    "lamb-zero0": {"optimizer": "LAMB", "zero_stage": 0},
    "lamb-fsdp": {"optimizer": "LAMB", "strategy": "fsdp"},
    "nvlamb-zero0": {"optimizer": "LAMB", "use_nvlamb": True, "zero_stage": 0},
    "nvlamb-fsdp": {"optimizer": "LAMB", "use_nvlamb": True, "strategy": "fsdp"},
    "adafactor": {"optimizer": "Adafactor", "zero_stage": 0},
    "adamw-8bit": {"bit_training": True, "zero_stage": 0},
    "lamb-8bit": {"optimizer": "LAMB", "bit_training": True, "zero_stage": 0},
}
BFLOAT16 = {
    "bf16-zero0": {"zero_stage": 0, "precision": "bf16"},
    "bf16-zero1": {"zero_stage": 1, "precision": "bf16"},
    "bf16-zero2": {"zero_stage": 2, "precision": "bf16"},
    "bf16-zero3": {"zero_stage": 3, "precision": "bf16"},
    "bf16-fsdp": {"strategy": "fsdp", "precision": "bf16"},
}
BFLOAT16_ADAPTERS = {  # what GPUs do when nothing is said
    "bf16-lora-zero0": {**LORA, "zero_stage": 0, "precision": "bf16"},
    "bf16-lora-zero2": {**LORA, "zero_stage": 2, "precision": "bf16"},
    "bf16-lora-zero3": {**LORA, "zero_stage": 3, "precision": "bf16"},
    "bf16-lora-fsdp": {**LORA, "strategy": "fsdp", "precision": "bf16"},
    "bf16-qlora-zero0": {**QUANT, "zero_stage": 0, "precision": "bf16"},
    "bf16-qlora-zero2": {**QUANT, "zero_stage": 2, "precision": "bf16", "gradient_checkpointing": True},
    "bf16-qlora-zero3": {**QUANT, "zero_stage": 3, "precision": "bf16"},
    "bf16-qlora-fsdp": {**QUANT, "strategy": "fsdp", "precision": "bf16", "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """All runs, done: a directory per run."""
    root = tmp_path_factory.mktemp("modes")
    plan = tiny.write_counting_plan(root / "cache", num_rows=20)
    for ranks in (2, 1):
        start(root, plan, ranks)
    return root


def start(root: Path, plan: Path, ranks: int) -> None:
    """Write the runs of a number of ranks, and do them in one start of the ranks."""
    names = []

    def add(name: str, **settings) -> None:
        defaults = {"plan_dir": plan, "max_steps": 6, **CONTINUED}
        tiny.write_run(root, name, **{**defaults, **settings})
        names.append({"run_dir": str(root / name)})

    for _, micro_batch, accumulation in (split for split in SPLITS if split[0] == ranks):
        split = {"per_gpu_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
        add(f"split-{micro_batch}x{accumulation}x{ranks}", max_steps=3, **split)
    if ranks == 2:
        add("base", architecture=ARCHITECTURE)
        for name, settings in {**ENGINES, **OPTIMIZERS, **BFLOAT16}.items():
            add(name, architecture=ARCHITECTURE, **settings)
        for name, settings in UNTIED_ENGINES.items():
            add(name, architecture=UNTIED, **settings)
        for name, settings in {**LORAS, **BFLOAT16_ADAPTERS}.items():
            add(name, model_dir=root / "base" / "model", lora_dropout=0.0, **settings)
    together = root / f"ranks-{ranks}"
    together.mkdir()
    (together / "config.yaml").write_text(yaml.safe_dump({"runs": names}))
    codes = tiny.wait(tiny.start(together, ranks, module="tests.support.many"), seconds=300)
    assert codes == [0] * ranks, tiny.logs(together)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (run_dir / "model" / "adapter_config.json").exists() else "model.safetensors"
    return load_file(run_dir / "model" / name)


def assert_same_training(left: Path, right: Path, rtol: float = 1e-5) -> None:
    ours, others = tiny.losses(tiny.metrics(left)), tiny.losses(tiny.metrics(right))
    assert ours == pytest.approx(others, rel=rtol)
    torch.testing.assert_close(weights(left), weights(right), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_splits_of_a_global_batch_give_the_same_losses_and_weights(root, split):
    ranks, micro_batch, accumulation = split
    assert_same_training(root / f"split-{micro_batch}x{accumulation}x{ranks}", root / "split-8x1x1")


@pytest.mark.parametrize("name", ENGINES)
def test_engines_give_the_same_losses_and_weights(root, name):
    assert_same_training(root / name, root / "base")


def test_embedding_and_output_layer_train_the_same_as_units_of_their_own(root):
    assert_same_training(root / "untied-fsdp", root / "untied-zero0")


def test_losses_fall_and_the_held_out_loss_too(root):
    losses = tiny.losses(tiny.metrics(root / "base"))
    assert losses[-1] < losses[0] - 0.3
    before, after = tiny.metrics(root / "base", "evaluations.jsonl")
    assert after["eval_loss"] < before["eval_loss"] - 0.3
    assert set(after["sources"]) == {"instruction", "pretraining", "all"}
    assert after["perplexity"] == pytest.approx(math.exp(after["eval_loss"]))


@pytest.mark.parametrize("name", LORAS)
def test_adapters_train_the_same_on_every_engine(root, name):
    quantised = "qlora" in name
    reference = "qlora-zero0" if quantised else "lora-zero0"
    assert_same_training(root / name, root / reference)
    losses = tiny.losses(tiny.metrics(root / name))
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(tiny.losses(tiny.metrics(root / "lora-zero0")), rel=0.01)
    adapter = weights(root / name)
    assert len(adapter) == 2 * 7 * 2, "A and B of all linear layers but the head"
    assert all(tensor.abs().max() > 0 for tensor in adapter.values()), "B starts at 0: every layer was trained"


def test_a_checkpoint_of_an_adapter_holds_no_base_weights(root):
    size = {
        name: sum(file.stat().st_size for file in (root / name / "checkpoints" / "step-000006").glob("*.safetensors"))
        for name in ("lora-zero2", "zero2")
    }
    assert size["lora-zero2"] < size["zero2"] / 3


@pytest.mark.parametrize(("name", "reference"), [("lamb-fsdp", "lamb-zero0"), ("nvlamb-fsdp", "nvlamb-zero0")])
def test_lamb_sees_whole_parameters_on_both_engines(root, name, reference):
    assert_same_training(root / name, root / reference)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_lower_the_loss(root, name):
    losses = tiny.losses(tiny.metrics(root / name))
    assert min(losses[1:]) < losses[0]


def test_8_bit_states_follow_the_32_bit_ones(root):
    assert tiny.losses(tiny.metrics(root / "adamw-8bit")) == pytest.approx(
        tiny.losses(tiny.metrics(root / "zero0")), rel=0.01
    )


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_follows_float32(root, name):
    assert tiny.losses(tiny.metrics(root / name)) == pytest.approx(tiny.losses(tiny.metrics(root / "base")), rel=0.01)


@pytest.mark.parametrize("name", BFLOAT16_ADAPTERS)
def test_adapters_in_bfloat16_follow_float32(root, name):
    losses = tiny.losses(tiny.metrics(root / name))
    assert losses == pytest.approx(tiny.losses(tiny.metrics(root / "lora-zero0")), rel=0.01)
    assert all(tensor.abs().max() > 0 for tensor in weights(root / name).values()), "every layer was trained"


def test_what_is_deployed(root):
    model = root / "base" / "model"
    assert {file.name for file in model.iterdir()} == {
        "config.json", "chat_template.jinja", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    generation = json.loads((model / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tiny.EOS
    assert json.loads((model / "config.json").read_text())["use_cache"] is True


def test_summary_and_metrics(root):
    summary = json.loads((root / "base" / "train.json").read_text())
    lines = tiny.metrics(root / "base")
    assert (summary["steps"], summary["exit_reason"]) == (6, "completed")
    assert summary["last_loss"] == lines[-1]["loss"]
    assert summary["eval_after"]["all"]["loss"] < summary["eval_before"]["all"]["loss"]
    for line in lines:
        spans = sum(line[f"seconds_{name}"] for name in ("data", "forward", "backward", "step"))
        assert 0 < spans <= line["seconds"]
        assert 0 <= line["padding"] < 0.5
        assert line["target_tokens"] < line["tokens"]
    assert [line["rows"] for line in lines] == [8, 8, 4, 8, 8, 4], "the last step of an epoch trains on what is left"
