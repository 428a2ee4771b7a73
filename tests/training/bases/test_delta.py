"""Delta checkpoints: base + delta is the fine-tuned model, and everything that can be wrong is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.bases.start import model_directory
from training.errors import CheckpointError
from training.models.shards import INDEX, tensors_of
from training.settings import ModelSettings

SHAPES = {"embed.weight": (40, 8), "layer.0.weight": (8, 8), "norm.weight": (8,), "head.weight": (40, 8)}


def weights(seed: int, dtype=torch.float16, scale=1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in SHAPES.items()}


def checkpoint(path: str, tensors: dict[str, torch.Tensor], parts: int = 1, tokenizer: bool = True) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "made_for": path}))
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    names = list(tensors)
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors" if parts > 1 else "model.safetensors"
        save_file({name: tensors[name] for name in names[part::parts]}, folder / file)
    return folder


def pair(parts: int = 1, dtype=torch.float16) -> dict[str, torch.Tensor]:
    """A base, and a delta of another layout on disk; returns the fine-tuned weights the sum should have."""
    base, change = weights(1, dtype), weights(2, dtype, 0.01)
    checkpoint("base", {**base, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    checkpoint("tuned-delta", change, parts, tokenizer=False)
    return {name: (base[name].float() + change[name].float()).to(dtype) for name in base}


def apply(**changes) -> Path:
    settings = ModelSettings(**{"ckpt_path": "tuned-delta", "delta_base": "base", **changes})
    return model_directory(settings, Path("cache"))


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_sum(parts, dtype):
    expected = pair(parts, dtype)
    folder = apply()
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == dtype for name in expected)
    assert json.loads((folder / "config.json").read_text())["made_for"] == "tuned-delta"
    assert (folder / "tokenizer.json").is_file(), "the base's, since the delta has none"
    assert (folder / INDEX).is_file() == (parts > 1)
    assert {name: info.shape for name, info in tensors_of(folder).items()} == SHAPES


def test_made_once_and_again_when_the_content_changes():
    pair()
    folder = apply()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    Path("base").rename("elsewhere")
    assert apply(delta_base="elsewhere") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    save_file(weights(3), "elsewhere/model.safetensors")
    assert apply(delta_base="elsewhere") != folder


def test_a_plain_checkpoint_stays_where_it_is():
    folder = checkpoint("tuned", weights(1))
    assert apply(ckpt_path="tuned") == folder.absolute()
    assert model_directory(ModelSettings(), Path("cache")) is None


def test_the_marker_names_base_and_sum():
    expected = pair()
    Path("tuned-delta").rename("tuned")
    total = sum(float(value.double().sum()) for value in expected.values())
    Path("tuned/delta.json").write_text(json.dumps({"base": "base", "sum": total + 0.5}))
    with pytest.raises(CheckpointError, match="made from another base"):
        apply(ckpt_path="tuned", delta_base=None)
    assert not list(Path("cache/models").iterdir()), "nothing half made is left"
    Path("tuned/delta.json").write_text(json.dumps({"base": "base", "sum": total}))
    assert apply(ckpt_path="tuned", delta_base=None).parent == Path("cache/models")


def spoil(name: str, tensor: torch.Tensor | None) -> None:
    change = weights(2, scale=0.01)
    change.pop(name)
    save_file({**change, **({name: tensor} if tensor is not None else {})}, "tuned-delta/model.safetensors")


def shorten(file: str) -> None:
    Path(file).write_bytes(Path(file).read_bytes()[:-8])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda: spoil("norm.weight", None), "1 tensors differ, norm.weight is only in the base"),
        (lambda: spoil("norm.weight", torch.zeros(9).half()), "norm.weight has shape (9,) there and (8,) in the base"),
        (lambda: spoil("norm.weight", torch.full((8,), torch.nan)), "norm.weight is not finite"),
        (lambda: save_file(weights(1), "tuned-delta/model.safetensors"), "holds whole weights, no delta"),
        (
            lambda: Path("tuned-delta/model.safetensors").write_bytes(b"\x10" + bytes(30)),
            "not a whole safetensors file",
        ),
        (lambda: shorten("tuned-delta/model.safetensors"), "not a whole safetensors file"),
        (lambda: spoil("norm.weight", torch.zeros(8, dtype=torch.int64)), "norm.weight is of type I64"),
    ],
)
def test_what_can_be_wrong(how, message):
    pair()
    how()
    with pytest.raises(CheckpointError) as caught:
        apply()
    assert message in str(caught.value)
    assert not list(Path("cache").rglob("*.safetensors"))


def test_a_delta_without_base():
    pair()
    with pytest.raises(CheckpointError, match="name its base with --delta_base"):
        apply(delta_base=None)
