"""Checks of one device, in this process: precision, kinds of attention, the optimizer's kernel.

In: a device. Out: what was `Found`. The attention kinds go through this project's own loss and packing check. Cost:
seconds, and on a GPU the memory of a matrix of 4,096 x 4,096.
"""

import importlib.util
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from training.distributed import Ranks
from training.engines.optimizers import build_optimizer
from training.gpu_check.lines import Found, NotAvailable
from training.models import attention
from training.models.loss import CausalLMLoss
from training.planning.hardware import GB
from training.settings import TrainSettings
from training.trainer import packing_check
from training.trainer.metrics import peak_flops

VOCABULARY = 64
BF16_ERROR = 0.02  # of a product of random matrices, relative to its size: 8 bits of mantissa
STEPS = 3


def gpus(device: torch.device) -> Found:
    """Names, memory, and whether their peak is known."""
    if device.type != "cuda":
        raise NotAvailable("no GPU: everything below runs on the CPU")
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    shown = ", ".join(sorted({f"{one.name} ({one.total_memory / GB:.0f} GB)" for one in names}))
    peak = peak_flops(device)
    return Found(f"{len(names)} x {shown}", f"peak {peak / 1e12:.0f} TFLOP/s" if peak else "peak not known: no MFU")


def bfloat16(device: torch.device) -> Found:
    """A product in bfloat16 against float32, and its speed."""
    size = 4096 if device.type == "cuda" else 256
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    exact = left @ right
    product = left.bfloat16() @ right.bfloat16()
    error = float((product.float() - exact).norm() / exact.norm())
    seconds = _seconds(lambda: left.bfloat16() @ right.bfloat16(), device)
    supported = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    measured = f"{error:.4f} relative error, {2 * size**3 / seconds / 1e12:.1f} TFLOP/s"
    return Found(measured, "" if supported else "emulated: precision auto is float32", error < BF16_ERROR and supported)


def _seconds(work: Callable[[], Tensor], device: torch.device, times: int = 10) -> float:
    """Of one call, after a first one."""
    work()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attention_kind(kind: str, device: torch.device) -> Found:
    """Packed segments are isolated, and the losses are those of the model's own logits; gradients are finite."""
    if kind == "flash_attention_2" and (device.type != "cuda" or importlib.util.find_spec("flash_attn") is None):
        raise NotAvailable("flash_attn is not installed" if device.type == "cuda" else "needs a GPU")
    if kind == "flex_attention" and device.type != "cuda":
        raise NotAvailable("flex attention has no backward pass on a CPU")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = CausalLMLoss(_small_model("sdpa" if kind == attention.NAME else kind, dtype))
    if kind == attention.NAME:
        attention.use(model.model)
    model.to(device).eval()
    ranks = _Alone(0, 0, 1, device)
    packing_check.check(model, packing_check.Checked(VOCABULARY, True, 2, dtype), ranks)
    batch = packing_check.pack([packing_check.random_segments(VOCABULARY)] * 2).to(device)
    model(batch)[0].backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    return Found(f"segments isolated, gradient norm {norm:.3f}", good=norm > 0 and norm < float("inf"))


class _Alone(Ranks):
    """A rank that needs nobody."""

    def _reduced(self, values: tuple[float, ...], operation: object) -> list[float]:
        return list(values)


def _small_model(kind: str, dtype: torch.dtype) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind)


def fused_adamw(device: torch.device) -> Found:
    """Steps of the optimizer that training uses, against torch's plain loop over tensors."""

    def trained(fused: bool) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(256, 256, device=device)
        settings = TrainSettings.model_validate({"learning_rate": 1e-2, "weight_decay": 0.1})
        optimizer = build_optimizer(list(layer.named_parameters()), settings)
        assert optimizer.defaults["fused"], "AdamW here is torch's fused kernel"
        if not fused:
            groups = [{**group, "fused": False, "foreach": False} for group in optimizer.param_groups]
            optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, foreach=False)
        for _ in range(STEPS):
            layer(torch.ones(4, 256, device=device)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer.weight.detach()

    difference = float((trained(fused=True) - trained(fused=False)).abs().max())
    return Found(f"differs by {difference:.1e} from one tensor at a time", good=difference < 1e-5)
