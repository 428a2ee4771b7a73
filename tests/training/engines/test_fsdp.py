"""FSDP: how often gradients are reduced over the ranks."""

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from tests.support.ranks_here import alone
from tests.training.models.test_loss import literal_batch, tiny
from training.distributed import join, leave, this_rank
from training.engines import fsdp
from training.engines.fsdp import FsdpEngine
from training.launch.processes import free_port
from training.models.adapter import add_adapter
from training.models.loss import CausalLMLoss, micro_batch
from training.settings import TrainSettings


@pytest.mark.parametrize(("lora", "reduced"), [(False, [True] * 3), (True, [False, False, True])])
def test_gradients_of_an_adapter_are_reduced_once_a_step(monkeypatch, lora, reduced):
    """Those of a whole model after every micro-batch: only shards of them fit."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    ranks = this_rank()
    join(ranks)
    calls = []
    reduce = _fsdp_param_group.foreach_reduce

    def counted(*arguments, **options):
        calls.append(arguments)
        return reduce(*arguments, **options)

    try:
        settings = TrainSettings(strategy="fsdp", use_lora=lora, lora_r=2)
        model = tiny().model
        module = CausalLMLoss(add_adapter(model, settings) if lora else model)
        engine = FsdpEngine.build(module, settings, ranks)
        monkeypatch.setattr(_fsdp_param_group, "foreach_reduce", counted)
        found = []
        for index in range(3):
            calls.clear()
            engine.backward(engine.forward(micro_batch(literal_batch(), [0, -1]))[0], last=index == 2)
            found.append(bool(calls))
        assert found == reduced
        assert torch.tensor(engine.step(0.1)).isfinite()
    finally:
        leave()


def test_layers_that_are_much_of_a_model_are_taken_apart_on_a_cpu(monkeypatch):
    module = CausalLMLoss(add_adapter(tiny().model, TrainSettings(use_lora=True, lora_r=2)))
    assert not list(fsdp._parts(module, torch.device("cpu"))), "too small to be worth it"
    monkeypatch.setattr(fsdp, "LEAST_PART", 2_000)
    monkeypatch.setattr(fsdp, "PARTS", 10**6)
    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    larger = ["mlp.gate_proj.base_layer", "mlp.up_proj.base_layer", "mlp.down_proj.base_layer"]
    names = {part: name.split("layers.")[-1] for name, part in module.named_modules()}
    found = [names[part] for part in fsdp._parts(module, torch.device("cpu"))]
    assert found == [f"{layer}.{part}" for layer in (0, 1) for part in attention + larger]
    assert not list(fsdp._parts(module, torch.device("cuda")))


def test_taken_apart_it_trains_the_same(monkeypatch):
    def trained(lora: bool) -> tuple[list[float], list[float]]:
        torch.manual_seed(0)
        settings = TrainSettings(strategy="fsdp", use_lora=lora, lora_r=2, lora_dropout=0.0)
        model = tiny().model
        module = CausalLMLoss(add_adapter(model, settings) if lora else model)
        engine = FsdpEngine.build(module, settings, ranks)
        batch, losses, norms = micro_batch(literal_batch(), [0, 1]), [], []
        for _ in range(2):
            loss, _ = engine.forward(batch)
            engine.backward(loss, last=True)
            losses.append(loss.item())
            norms.append(engine.step(0.01))
        return losses, norms

    with alone() as ranks:
        whole = [trained(lora) for lora in (False, True)]
        monkeypatch.setattr(fsdp, "LEAST_PART", 1_000)
        monkeypatch.setattr(fsdp, "PARTS", 10**6)
        assert [trained(lora) for lora in (False, True)] == whole
