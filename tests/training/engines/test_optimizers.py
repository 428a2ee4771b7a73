"""Optimizers: which one a name gives, what decays, LAMB by its formula."""

import math

import bitsandbytes
import pytest
import torch
from torch import nn

from training.engines.optimizers import (
    BUILDERS,
    Lamb,
    build_optimizer,
    length,
    parameter_groups,
    restored_number,
    trust_ratio,
)
from training.planning.memory import STATE_BYTES
from training.settings import OPTIMIZERS, OptimizerSettings


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))


def build(**settings) -> torch.optim.Optimizer:
    return build_optimizer(layer().named_parameters(), OptimizerSettings(**settings))


def test_matrices_decay_norms_and_biases_do_not():
    groups = parameter_groups(layer().named_parameters(), 0.1)
    assert [(group["weight_decay"], [p.dim() for p in group["params"]]) for group in groups] == [
        (0.1, [2]),
        (0.0, [1, 1, 1]),
    ]


def test_frozen_parameters_are_in_no_group():
    module = layer()
    module[0].weight.requires_grad = False
    assert [len(group["params"]) for group in parameter_groups(module.named_parameters(), 0.1)] == [3]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"optimizer": "AdamW"}, torch.optim.AdamW),
        ({"optimizer": "adamw", "bit_training": True}, bitsandbytes.optim.AdamW8bit),
        ({"optimizer": "LAMB"}, Lamb),
        ({"optimizer": "LAMB", "bit_training": True}, bitsandbytes.optim.LAMB8bit),
        ({"optimizer": "Adafactor"}, torch.optim.Adafactor),
        ({"optimizer": {"_target_": "torch.optim.SGD", "momentum": 0.5}}, torch.optim.SGD),
    ],
)
def test_names(settings, kind):
    assert type(build(**settings)) is kind


def test_betas_and_epsilon_are_really_used():
    group = build(adam_betas=(0.7, 0.8), adam_epsilon=1e-3).param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-3)
    assert build(optimizer="LAMB", adam_betas=(0.7, 0.8)).param_groups[0]["betas"] == (0.7, 0.8)


def test_lamb_first_step_by_hand():
    """After bias correction the first update is sign(g) (eps 0), plus decay; scaled by |w| / |update|."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    bias = nn.Parameter(torch.tensor([1.0]))
    optimizer = Lamb([{"params": [weight, bias]}], lr=0.1, eps=0.0, weight_decay=0.0)
    weight.grad, bias.grad = torch.tensor([[2.0, -8.0]]), torch.tensor([5.0])
    optimizer.step()
    ratio = 5 / math.sqrt(2)
    torch.testing.assert_close(weight.data, torch.tensor([[3 - 0.1 * ratio, 4 + 0.1 * ratio]]))
    torch.testing.assert_close(bias.data, torch.tensor([0.9]))


def test_lamb_decay_is_inside_the_trust_ratio():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = Lamb([weight], lr=0.1, eps=0.0, weight_decay=0.5)
    weight.grad = torch.tensor([[2.0, -8.0]])
    optimizer.step()
    update = torch.tensor([[1 + 1.5, -1 + 2.0]])
    expected = torch.tensor([[3.0, 4.0]]) - 0.1 * 5 / update.norm() * update
    torch.testing.assert_close(weight.data, expected)


def test_nvlamb_does_not_depend_on_the_scale_of_the_gradient():
    def second_weight(scale: float) -> torch.Tensor:
        weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        optimizer = Lamb([weight], lr=0.1, normalise_gradients=True)
        for gradient in ([[1.0, 2.0]], [[5.0, -1.0]]):
            weight.grad = torch.tensor(gradient) * scale
            optimizer.step()
            scale *= 10  # Adam's moments would see this, normalised gradients do not
        return weight.data

    torch.testing.assert_close(second_weight(1.0), second_weight(1e-3))


def test_lengths_of_many_numbers_are_exact():
    """28 million: summed in float32 on a CPU, the norm is 0.19 % short."""
    values = torch.full((7000, 4000), 0.01)
    exact = 0.01 * math.sqrt(28e6)
    assert float(values.norm()) != pytest.approx(exact, rel=1e-3)
    assert length([values]) == pytest.approx(exact, rel=1e-6)
    assert trust_ratio(values, torch.ones(2, 2)) == pytest.approx(exact / 2, rel=1e-6)


@pytest.mark.parametrize(("settings", "device"), [({}, "meta"), ({"optimizer": "LAMB"}, "cpu")])
def test_a_count_is_restored_where_the_optimizer_reads_it(settings, device):
    """As torch's own `load_state_dict` does; "meta" stands for a GPU."""
    count = torch.tensor(3.0)
    restored = restored_number(count, build(**settings), torch.device("meta"))
    assert restored.device.type == device
    assert restored is not count


def test_a_count_of_bitsandbytes_is_a_number_of_python():
    restored = restored_number(torch.tensor(3), build(bit_training=True), torch.device("meta"))
    assert type(restored) is int and restored == 3


def test_every_optimizer_that_can_be_named_can_be_built_and_weighed():
    assert {name for name, _ in BUILDERS} == set(OPTIMIZERS) == set(STATE_BYTES)
