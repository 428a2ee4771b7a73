"""Export: the merged model says what adapter and base say, or is refused; the card states facts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.own_code import save_own_model
from tests.support.tiny_models import save_adapter, save_full_model
from tests.training.registry.test_register import greedy, tracked_run
from training.errors import CheckpointError, ModelError
from training.export import merge, parity
from training.export.export import CONVERTER, Exported, ExportError, Source, export, to_gguf
from training.models.build import load_deployed
from training.models.shards import shards, tensors_of
from training.registry import publish
from training.registry.publish import CardFacts, model_card
from training.registry.register import register
from training.registry.versions import Registry

PROMPTS = [[5, 17, 200, 31], [9, 9, 120], list(range(40))]


@pytest.fixture
def base(tmp_path):
    """A base model in two shards."""
    model = save_full_model(tmp_path / "base")
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    (tmp_path / "base" / "model.safetensors").unlink()
    assert len(shards(tmp_path / "base")) > 1
    return tmp_path / "base"


def write_card(done) -> str:
    return model_card(CardFacts("models:/tiny/1", {}), done)


def test_the_merged_model_is_base_plus_adapter(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter")
    done = export(Source(tmp_path / "adapter", PROMPTS), tmp_path / "out", write_card)
    assert done.kind == "streamed" and done.difference.top1_agreement == 1 and done.difference.mean_kl < 1e-6
    merge.merge_in_memory(tmp_path / "adapter", base, tmp_path / "peft")
    ours, theirs = ({k: v for f in shards(d) for k, v in load_file(f).items()}
                    for d in (tmp_path / "out", tmp_path / "peft"))  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert greedy(merged, tmp_path / "out", "hello", 16) == greedy(adapter, tmp_path / "adapter", "hello", 16)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_patterns_scales_and_whole_layers(base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_rslora=True, rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 5}, modules_to_save=["lm_head"], task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    save_full_model(tmp_path / "tokenizer")  # for the tokenizer's files
    done = export(Source(tmp_path / "adapter", PROMPTS), tmp_path / "out", write_card)
    assert done.kind == "streamed" and done.difference.max_kl < 1e-6


def test_dora_and_rows_of_tokens_are_merged_as_by_peft(base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    rows = {"embed_tokens": [3, 7], "lm_head": [7]}
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"], trainable_token_indices=rows)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    merge.merge_in_memory(tmp_path / "adapter", base, tmp_path / "peft")
    (tmp_path / "ours").mkdir()
    assert merge.merge(tmp_path / "adapter", base, tmp_path / "ours") == "streamed"
    ours, theirs = (tensors_of(tmp_path / name) for name in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.read(), theirs[name].read(), rtol=1e-5, atol=1e-6)


def test_code_of_the_base_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    save_own_model(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers would ask is not asked
    with pytest.raises(ModelError, match=r": the code of this model .* only with --trust_remote_code"):
        export(Source(tmp_path / "adapter", PROMPTS, tmp_path / "base"), tmp_path / "out", write_card)
    with pytest.raises(ModelError, match="--trust_remote_code"):
        load_deployed(tmp_path / "base")
    source = Source(tmp_path / "adapter", PROMPTS, tmp_path / "base", trust_remote_code=True)
    done = export(source, tmp_path / "out", write_card)
    assert done.difference.top1_agreement == 1 and (tmp_path / "out" / "own.py").is_file()


def test_what_cannot_be_streamed_is_merged_in_memory(base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(bias="all", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    done = export(Source(tmp_path / "adapter", PROMPTS), tmp_path / "out", write_card)
    assert done.kind == "in memory" and done.difference.top1_agreement == 1
    with pytest.raises(ModelError, match=r"0.0 GB, and 0.0 GB are available. Use it unmerged \(panda serve"):
        merge.check_memory(tmp_path / "adapter", base, 1000)


def test_merged_and_tuned_are_compared_without_holding_either(base, tmp_path, monkeypatch):
    """At every moment of both forward passes one layer at most is there; the numbers are those of whole models."""
    save_adapter(base, tmp_path / "adapter")
    export(Source(tmp_path / "adapter", PROMPTS), tmp_path / "out", write_card)
    model = parity.load(tmp_path / "adapter", base)
    there: list[int] = []

    def count(*_) -> None:
        there.append(sum(not layer.mlp.up_proj.base_layer.weight.is_meta for layer in layers))

    layers = [part for part in model.modules() if type(part).__name__ == "LlamaDecoderLayer"]
    for layer in layers:
        layer.mlp.register_forward_pre_hook(count)
    found = parity.log_probabilities(model, PROMPTS)
    assert there == [1] * len(layers) and len(layers) > 1
    whole = load_deployed(tmp_path / "adapter")
    for ids, logs in zip(PROMPTS, found, strict=True):
        expected = whole(torch.tensor([ids])).logits[0].log_softmax(-1)[-parity.POSITIONS :]
        torch.testing.assert_close(logs, expected, rtol=1e-5, atol=1e-5)


def test_a_merge_that_changes_the_model_is_refused(base, tmp_path, monkeypatch):
    save_adapter(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "alpha_pattern": {"q_proj": 3000}}))  # peft scales q_proj, so must we
    assert export(Source(tmp_path / "adapter", PROMPTS), tmp_path / "out", write_card).difference.top1_agreement == 1
    monkeypatch.setattr(merge.Adapter, "scale", lambda self, name: 0.0)  # a fault in our own merge
    with pytest.raises(ExportError, match="gives another model"):
        export(Source(tmp_path / "adapter", PROMPTS), tmp_path / "wrong", write_card)
    assert not (tmp_path / "wrong").exists()


def test_a_quantised_base_is_refused(base, tmp_path):
    save_adapter(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ModelError, match="quantised"):
        export(Source(tmp_path / "adapter", PROMPTS), tmp_path / "out", write_card)


def test_bfloat16_is_rounded_once(tmp_path):
    save_full_model(tmp_path / "base").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    export(Source(tmp_path / "adapter", PROMPTS), tmp_path / "out", write_card)
    adapter = merge.read_adapter(tmp_path / "adapter")
    name = "model.layers.0.self_attn.q_proj.weight"
    (before,), (after,) = ([load_file(f)[name] for f in shards(tmp_path / d)] for d in ("base", "out"))
    exact = before.double() + adapter.scale(name) * (adapter.b[name].double() @ adapter.a[name].double())
    assert after.dtype == torch.bfloat16 and torch.equal(after, exact.float().to(torch.bfloat16))


@pytest.mark.usefixtures("load_back_here")
def test_a_version_is_exported_with_its_card(run_dir, tmp_path):
    save_full_model(run_dir / "model")
    report = {"records_in": 12, "accepted": 10, "rejected": {"empty_target": 2}, "dropped": {}}
    (run_dir / "report").mkdir()
    (run_dir / "report" / "data.json").write_text(json.dumps(report))
    paths = {"plan_dir": "/gone", "tokenizer_dir": "/gone", "run_dir": str(run_dir)}
    config = {"model": "tiny", "learning_rate": 0.001, "cache_dir": "/gone", "paths": paths}
    (run_dir / "config.yaml").write_text(json.dumps(config))
    (run_dir / "gate.json").write_text(json.dumps({"slices": [], "reasons": ["first version"]}))
    tracked = tracked_run(run_dir)
    tags = {"panda.corpus": "c" * 32, "eval_loss.instruction": "1.25"}
    version = register(run_dir, tracked.run_id, "panda-tiny", tags, tracked.uri)
    registry = Registry(tracked.uri)
    done = publish.publish(registry, registry.resolve(version.uri), publish.Asked(tmp_path / "out", tmp_path / "cache"))
    assert done.kind == "copied"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "training_config.yaml"} <= names
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| rejected: empty_target | 2 |" in card and "| instruction | 1.25 |" in card and "first version" in card
    assert "`" + "c" * 32 + "`" in card and "paths" not in (tmp_path / "out" / "training_config.yaml").read_text()
    weights = tmp_path / "out" / "model.safetensors"
    assert not weights.samefile(run_dir / "model" / "model.safetensors")
    with pytest.raises(ExportError, match="already"):
        publish.publish(registry, registry.resolve(version.uri), publish.Asked(tmp_path / "out", tmp_path / "cache"))


def test_the_card_names_the_licence_of_the_base(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# The base\n")
    card = model_card(CardFacts("models:/tiny/1", {}), Exported("out", "streamed", str(tmp_path)))
    assert card.startswith("---\nlibrary_name: transformers\n") and "license: apache-2.0\n" in card
    (tmp_path / "README.md").write_text("# No licence stated\n")
    assert "license" not in model_card(CardFacts("models:/tiny/1", {}), Exported("out", "streamed", str(tmp_path)))


def test_an_export_has_what_other_programs_read(base, tmp_path):
    """Whole weights or merged adapter: architecture, ways to stop, tokenizer, template; in old words as well."""
    save_adapter(base, tmp_path / "adapter")
    for directory in (base, tmp_path / "adapter"):
        (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for name, source in (("whole", base), ("merged", tmp_path / "adapter")):
        export(Source(source, PROMPTS), tmp_path / name, write_card)
        config, generation, tokenizer = (
            json.loads((tmp_path / name / file).read_text())
            for file in ("config.json", "generation_config.json", "tokenizer_config.json")
        )
        assert config["architectures"] == ["LlamaForCausalLM"] and config["torch_dtype"] == config["dtype"]
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
        assert generation["eos_token_id"] == 0
        assert (tokenizer["tokenizer_class"], tokenizer["eos_token"]) == ("PreTrainedTokenizerFast", "</s>")
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert {"tokenizer.json", "chat_template.jinja", "README.md"} <= files
        assert "adapter_config.json" not in files and {path.suffix for path in shards(tmp_path / name)} == {
            ".safetensors"
        }


CONVERTER_SCRIPT = """import sys
from pathlib import Path
model_dir, option, output = sys.argv[1:]
assert option == "--outfile" and Path(model_dir, "config.json").is_file(), "no config.json there"
Path(output).write_bytes(b"GGUF")
"""


def test_gguf_needs_the_converter_and_says_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    save_full_model(tmp_path / "model")
    with pytest.raises(ExportError, match=f"needs {CONVERTER} of llama.cpp on PATH; the export in .* is complete"):
        to_gguf(tmp_path / "model")
    (tmp_path / CONVERTER).write_text(CONVERTER_SCRIPT)
    (tmp_path / CONVERTER).chmod(0o755)
    assert to_gguf(tmp_path / "model").read_bytes() == b"GGUF"
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ExportError, match=r"failed on .*\n(?s:.*)no config.json there"):
        to_gguf(tmp_path / "model")


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(CheckpointError, match="safetensors"):
        shards(tmp_path / "base")
    save_file({"a": torch.ones(1)}, tmp_path / "base" / "model.safetensors")
    assert list(tensors_of(tmp_path / "base")) == ["a"]
