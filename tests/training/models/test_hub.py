"""Where weights come from: three places, and a clear message for everything that can be missing."""

from pathlib import Path

import pytest

from training.errors import CheckpointError
from training.models.hub import base_checkpoint, description, resolve_checkpoint
from training.settings import ModelSettings

COMPLETE = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def make(folder: str, files: tuple[str, ...] = COMPLETE) -> Path:
    path = Path(folder)
    path.mkdir(parents=True)
    for name in files:
        (path / name).write_text("{}")
    return path.absolute()


def test_a_directory():
    folder = make("pretrain/llama-7b")
    assert resolve_checkpoint("pretrain/llama-7b") == folder
    assert resolve_checkpoint(str(folder)) == folder


def test_a_folder_below_pretrained_models():
    folder = make("pretrained-models/mine")
    assert resolve_checkpoint("mine") == folder


def test_a_hub_id_from_the_cache():
    commit = "0" * 40
    snapshot = make(f"hub/models--owner--name/snapshots/{commit}")
    refs = Path("hub/models--owner--name/refs")
    refs.mkdir()
    (refs / "main").write_text(commit)
    assert resolve_checkpoint("owner/name") == snapshot


@pytest.mark.parametrize("name", ["nowhere", "owner/nowhere"])
def test_not_found_names_all_places(name, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(name)
    text = str(caught.value)
    assert f"no directory {tmp_path / name}" in text
    assert f"none {tmp_path / 'pretrained-models' / name}" in text
    assert ("not a hub id" in text) == ("/" not in name)
    assert ("cannot be reached" in text) == ("/" in name)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("model.safetensors", "tokenizer.json"), "no config.json"),
        (("config.json", "tokenizer.json"), "no .safetensors weights"),
        (("config.json", "pytorch_model.bin", "tokenizer.json"), "convert them once: python -c"),
        (("config.json", "model.safetensors"), "no tokenizer"),
    ],
)
def test_incomplete(files, message):
    make("broken", files)
    with pytest.raises(CheckpointError, match=r"ckpt_path='broken': there (is|are)") as caught:
        resolve_checkpoint("broken")
    assert message in str(caught.value)


def test_a_delta_without_tokenizer_is_described_by_its_base():
    base = make("base", COMPLETE[::2])
    make("tuned-delta", COMPLETE[:2])
    settings = ModelSettings(ckpt_path="tuned-delta", delta_base="base")
    assert description(settings) == base
    Path("tuned-delta/tokenizer.json").touch()
    assert description(settings) == Path("tuned-delta").absolute()
    assert description(ModelSettings(ckpt_path="owner/nowhere")) is None
    assert description(ModelSettings()) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"model": "llama-7b"}, None),
        ({"model": "llama-7b", "ckpt_path": "here"}, "here"),
        ({"model": "owner/name"}, "owner/name"),
        ({"model": "folder"}, "folder"),
        ({"model": "below"}, "below"),
    ],
)
def test_base_checkpoint(given, expected):
    make("folder")
    make("pretrained-models/below")
    assert base_checkpoint(ModelSettings(**given)) == expected
