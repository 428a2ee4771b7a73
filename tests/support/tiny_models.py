"""Tiny real models on disk: a Llama with random weights, an adapter of it, a byte-level tokenizer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def save_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens with eos and no chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["hello world, this is a test"] * 5, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    wrapped.save_pretrained(directory)
    return wrapped


def save_full_model(directory: Path, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 60,000 weights with its tokenizer."""
    vocabulary = len(save_tokenizer(directory))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(directory)
    return model


def save_adapter(base_dir: Path, directory: Path, seed: int = 1):
    """A LoRA adapter that changes what the base says, with the base's tokenizer."""
    from peft import LoraConfig, get_peft_model

    base = LlamaForCausalLM.from_pretrained(base_dir)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model
