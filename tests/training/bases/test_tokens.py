"""New tokens: old texts have the ids and all other rows the bits they had."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data_prep.tokenizer import load_tokenizer
from data_prep.tokens.encoder import load_engine
from training.bases.tokens import with_tokens
from training.errors import CheckpointError

ROOT = Path(__file__).parents[3]
NEW = ["<tool>", "</tool>", "中文词"]
SIZES = {
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "phi": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},  # biases
}


def checkpoint(directory: Path, tokenizer: Path, kind: str, spare_rows: int = 0, **options) -> Path:
    """A small model of random weights for a tokenizer, with its files."""
    tokens = len(AutoTokenizer.from_pretrained(tokenizer))
    config = AutoConfig.for_model(kind, **SIZES[kind], vocab_size=tokens + spare_rows, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # biases as well
    model.save_pretrained(directory)
    for file in tokenizer.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("name", ["bytes_dir", "llama_dir", "smollm2_dir"])
def test_texts_without_them_have_the_ids_they_had(name, request, tmp_path):
    """Real texts, Chinese among them; by every engine, and by what generates."""
    tokenizer = request.getfixturevalue(name)
    folder = checkpoint(tmp_path / "model", tokenizer, "llama")
    made = with_tokens(folder, NEW, tmp_path / "cache")
    before, after = load_tokenizer(folder), load_tokenizer(made)
    texts = [path.read_text() for path in (ROOT / "README.md", ROOT / "README.zh.md", ROOT / "training" / "compare.py")]
    num_old = before.core.get_vocab_size()
    for setting in ("auto", "reference"):
        ours, theirs = (load_engine(one.core, setting).encode(texts).ids.tolist() for one in (after, before))
        assert ours == theirs
        (ids,) = [load_engine(after.core, setting).encode([f"a {NEW[0]}x{NEW[2]}{NEW[1]} b"]).ids.tolist()]
        assert [i for i in ids if i >= num_old] == [num_old, num_old + 2, num_old + 1]
    generating = AutoTokenizer.from_pretrained(made)
    assert len(generating) == num_old + 3 == AutoConfig.from_pretrained(made).vocab_size
    assert generating.convert_tokens_to_ids(NEW) == [num_old, num_old + 1, num_old + 2]
    assert (
        generating(texts[0], add_special_tokens=False).input_ids
        == before.core.encode(texts[0], add_special_tokens=False).ids
    )
    assert after.fingerprint != before.fingerprint, "tokens are made anew"
    assert (after.eos_id, after.bos_ids, after.special_ids) == (before.eos_id, before.bos_ids, before.special_ids)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": False}), ("gpt2", {}), ("phi", {})],
)
@pytest.mark.parametrize("spare", [0, 2, 5])
def test_other_rows_keep_their_bits_and_new_ones_are_the_mean(bytes_dir, tmp_path, kind, options, spare):
    folder = checkpoint(tmp_path / "model", bytes_dir, kind, spare, **options)
    made = with_tokens(folder, NEW, tmp_path / "cache")
    num_old = load_tokenizer(folder).core.get_vocab_size()
    before, after = weights(folder), weights(made)
    assert before.keys() == after.keys()
    changed = [
        name for name in before if before[name].shape != after[name].shape or (before[name] != after[name]).any()
    ]
    ends = {"llama": 1 if options.get("tie_word_embeddings") else 2, "gpt2": 1, "phi": 3}  # phi: a bias of its head
    assert len(changed) == ends[kind]
    for name in changed:
        rows, had = after[name], before[name]
        assert len(rows) == max(len(had), num_old + 3)
        assert torch.equal(rows[:num_old], had[:num_old]) and torch.equal(rows[num_old + 3 :], had[num_old + 3 :])
        torch.testing.assert_close(
            rows[num_old : num_old + 3], had[:num_old].mean(0).expand_as(rows[num_old : num_old + 3])
        )
    model, _ = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(after[changed[0]])
    ids = torch.tensor([[5, 6, 7, 8]])
    old = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[..., :num_old]
    torch.testing.assert_close(model(ids).logits[..., :num_old], old)


def test_names_without_the_prefix_of_the_decoder(bytes_dir, tmp_path):
    folder = checkpoint(tmp_path / "model", bytes_dir, "gpt2")
    bare = {name.removeprefix("transformer."): value for name, value in weights(folder).items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    made = with_tokens(folder, NEW, tmp_path / "cache")
    assert len(weights(made)["wte.weight"]) == len(bare["wte.weight"]) + 3
    save_file(
        {f"x{name}": value for name, value in bare.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=r"finds none of transformer\.wte\.weight, lm_head\.weight"):
        with_tokens(folder, NEW, tmp_path / "cache")


def test_made_once_and_only_of_what_is_new(bytes_dir, tmp_path):
    folder = checkpoint(tmp_path / "model", bytes_dir, "llama")
    made = with_tokens(folder, NEW, tmp_path / "cache")
    assert with_tokens(folder, NEW, tmp_path / "cache") == made != with_tokens(folder, NEW[:1], tmp_path / "cache")
    assert with_tokens(made, NEW, tmp_path / "cache") == made, "a champion that has them already"
    assert with_tokens(folder, ["<s>"], tmp_path / "cache") == with_tokens(folder, [], tmp_path / "cache") == folder
    more = with_tokens(made, [*NEW, "<more>"], tmp_path / "cache")
    assert json.loads((more / "config.json").read_text())["vocab_size"] == len(AutoTokenizer.from_pretrained(made)) + 1
