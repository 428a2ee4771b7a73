"""Model FLOPs utilisation: what is counted, and against which peak."""

import pytest

from tests.training.models.test_loss import tiny
from training.models.adapter import add_adapter
from training.models.loss import causal_model
from training.settings import TrainSettings
from training.trainer.metrics import Flops, flops_of, peak_of


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_the_peak_of_a_board_by_its_name(name, teraflops):
    assert peak_of(name) == pytest.approx(teraflops * 1e12)


def test_the_peak_of_another_device_is_not_known():
    assert peak_of("AMD Instinct MI300X") is None
    assert peak_of("NVIDIA A1000") is None, "not an A100"


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_counts_for_targets_only(tied):
    causal = tiny(tie_word_embeddings=tied).model
    head, embedding = causal.get_output_embeddings().weight, causal.get_input_embeddings().weight
    body = sum(p.numel() for p in causal.parameters() if p is not head and p is not embedding)
    flops = flops_of(causal)
    assert flops == Flops(6 * body, 6 * head.numel())
    assert flops.of(tokens=10, targets=2) == 60 * body + 12 * head.numel()


def test_frozen_weights_have_no_gradient_of_their_own():
    causal = tiny().model
    frozen = flops_of(causal)
    adapted = causal_model(add_adapter(causal, TrainSettings(use_lora=True, lora_r=2)))
    adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert flops_of(adapted) == Flops(frozen.per_token * 4 / 6 + 6 * adapter, frozen.per_target * 4 / 6)
