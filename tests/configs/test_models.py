"""Every shipped YAML loads, and every architecture has the published number of parameters (on the meta device)."""

from pathlib import Path

import pytest
import yaml

from configs.load import CONFIG_DIR, load, names

PARAMETERS = {
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "gemma-3-270m": 268_098_176,
    "llama-13b": 13_015_864_320,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-7b": 6_738_415_616,
    "mistral-7b": 7_248_023_552,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "panda-tiny": 1_262_720,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-14b": 14_768_307_200,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "tinyllama-1.1b": 1_100_048_384,
}
GUIDE = {"llama-7b": 6.74, "llama-13b": 13.02, "llama-33b": 32.53, "llama-65b": 65.29}


def test_every_model_has_a_published_count():
    assert set(PARAMETERS) == set(names("model"))


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_architecture_on_the_meta_device(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = load({"model": name}).settings
    config = AutoConfig.for_model(**settings.architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETERS[name]
    assert name not in GUIDE or round(count / 1e9, 2) == GUIDE[name]
    assert not set(settings.architecture) - set(config.to_dict()) - {"rope_theta", "rope_scaling"}, "unknown field"


SHIPPED = sorted(CONFIG_DIR.rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_yaml_loads(path: Path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent == CONFIG_DIR:
        loaded = load() if "defaults" in content else load(conf_path=path)
    elif path.stem == "from-path":
        loaded = load({"model": "owner/name"})
    else:
        loaded = load({path.parent.name: path.stem})
        assert getattr(loaded.settings, path.parent.name) == path.stem
    origins = set(loaded.origins.values())
    assert "default" in origins
    assert loaded.settings.model
