"""What is decided from the GPUs a machine shows; here it only seems to have them."""

import pytest
import torch

from training.distributed import this_rank
from training.errors import DeviceError
from training.models import build
from training.settings import TrainSettings


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("precision", "has_bf16", "attention"),
    [("auto", True, "flash_attention_2"), ("auto", False, None), ("bf16", True, "flash_attention_2"),
     ("float32", True, None)],
)  # fmt: skip
def test_flash_attention_is_chosen_in_16_bits_only(two_gpus, monkeypatch, precision, has_bf16, attention):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    asked: list[str | None] = []
    build._with_attention(TrainSettings(precision=precision), asked.append)
    assert asked == [attention]


def test_a_rank_without_gpu_says_so(two_gpus, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")  # `this_rank` fills in what is not set, and would leave it behind
    for local_rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert this_rank().device == torch.device("cuda", local_rank)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(DeviceError, match=r"rank 2 .* there are 2\..*--num_processes 2"):
        this_rank()
