"""What is rehearsed with tensors without memory is what real ranks over gloo hold and send."""

import json

import pytest
import torch

from tests.support.tallied import NUM_VALIDATION, write_tallied_run
from tests.support.tiny import logs, start, wait
from tests.support.tiny_models import save_full_model
from training.launch.run_config import read_config
from training.planning.hardware import Hardware
from training.planning.memory import estimate
from training.planning.model_shape import config_from, measure
from training.planning.rehearsal import rehearse
from training.planning.rehearsal_job import PlayedPhase, Rehearsal
from training.settings import TrainSettings

ROWS = {"per_gpu_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_gpu_eval_batch_size": 4}


def played(settings: TrainSettings, ranks=2, is_gpu=False, **rows) -> dict[str, PlayedPhase]:
    wanted = Rehearsal(settings.model_dump(mode="json"), rows.pop("model_dir", None), ranks, is_gpu, 64, **rows)
    return {phase.name: phase for phase in rehearse(wanted)}


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_real_ranks_hold_and_send_the_same(tmp_path, ranks):
    save_full_model(tmp_path / "model")
    eval_rows = NUM_VALIDATION // ranks  # of each rank, at once
    rows = ROWS | {"per_gpu_eval_batch_size": eval_rows}
    asked = {"gradient_checkpointing": True, "on_spike": "off", **rows}  # what ranks agree on is not played
    run_dir = write_tallied_run(tmp_path, "run", tmp_path / "model", 64, 4, **asked)
    assert wait(start(run_dir, ranks, module="tests.support.tallied")) == [0] * ranks, logs(run_dir)
    real = json.loads((run_dir / "tally-0.json").read_text())
    settings = read_config(run_dir / "config.yaml").settings
    told = played(settings, ranks, model_dir=str(tmp_path / "model"), num_segments=4)
    for name in ("step", "evaluate"):
        assert told[name].held == pytest.approx(real[name]["held"], abs=6_000), "batches are made beforehand"
        assert told[name].peak == pytest.approx(real[name]["peak"], rel=0.02)
        assert told[name].sent == pytest.approx(real[name]["sent"], rel=0.01)


def test_what_is_trained_decides_what_is_held_saved_and_sent():
    architecture = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 512,
    }  # fmt: skip
    common = {"architecture": architecture, "precision": "bf16", "lora_r": 4, **ROWS}
    full, lora, quant = (
        played(TrainSettings(**common, **values), ranks=4, is_gpu=True)
        for values in ({}, {"use_lora": True}, {"use_lora": True, "use_quant": True})
    )
    body = 2 * (4 * 256 * 256 + 3 * 256 * 512)  # what is quantised
    parameters = body + 2 * 512 * 256 + 5 * 256
    assert full["load"].held == pytest.approx(parameters * 4 / 4, rel=0.01), "float32 shards of four ranks"
    assert full["step"].held == pytest.approx(parameters * 12 / 4, rel=0.01), "and two states"
    assert full["save"].host == pytest.approx(parameters * 12 / 4, rel=0.01)
    adapter = 2 * 4 * (4 * (256 + 256) + 3 * (256 + 512))
    assert lora["save"].host == pytest.approx(adapter * 12 / 4, rel=0.05)
    assert lora["export"].sent == pytest.approx(adapter * 4 * 3 / 4, rel=0.01)
    assert full["export"].sent == 0, "every rank writes its own shards"
    four_bits = body / 2 / 4 + body * (1 / 64 + 4 / (64 * 256)) + (parameters - body + adapter) * 4 / 4
    assert quant["load"].held == pytest.approx(four_bits, rel=0.05)
    assert quant["step"].sent < lora["step"].sent < full["step"].sent
    gathered = parameters * 2 * 3 / 4  # of bfloat16 weights, forward and backward, in each micro-batch
    reduced = parameters * 4 * 3 / 4
    assert full["step"].sent == pytest.approx(2 * (2 * gathered + reduced), rel=0.15)


WAYS = {
    "full": {},
    "LoRA": {"use_lora": True},
    "DoRA": {"use_lora": True, "use_dora": True},
    "DoRA, 4 bits": {"use_lora": True, "use_dora": True, "use_quant": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_formula_knows_the_activations_that_are_played(way):
    """What gradient checkpointing frees is found apart from all else: both by the formula and by a played step."""
    architecture = {
        "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
        "num_attention_heads": 16, "vocab_size": 8192,
    }  # fmt: skip
    common = {"architecture": architecture, "precision": "bf16", "strategy": "fsdp", **ROWS, **WAYS[way]}
    told, needed = [], []
    for checkpointing in (False, True):
        settings = TrainSettings(**common, gradient_checkpointing=checkpointing)
        needed.append(played(settings, ranks=4, is_gpu=True)["step"].peak)
        shape = measure(config_from(None, architecture), settings, 64, torch.bfloat16, packed=False)
        told.append(estimate(shape, settings, Hardware(4, is_gpu=True, bf16=True)).total)
    assert told[0] - told[1] == pytest.approx(needed[0] - needed[1], rel=0.2)
