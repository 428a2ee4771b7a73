"""A working directory in which the commands of the guide run for real: tiny weights stand where 7B and 65B ones would.

``pretrained-models/huggyllama/llama-7b`` is found before the hub is asked for ``huggyllama/llama-7b``, so the commands
stay as they are written. Tokenizer and corpus are made here as well; nothing is downloaded.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.support import warm
from tests.support.prefect_database import new_home

ROOT = Path(__file__).parents[2]
BASES = ("huggyllama/llama-7b", "huggyllama/llama-65b")
DELTA = "chitanda/llama-panda-zh-7b-delta"
ARCHITECTURE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
NUM_TOKENS = 128
SHORT = [
    "--max_steps",
    "2",
    "--gradient_accumulation_steps",
    "1",
    "--num_processes",
    "1",
    "--max_seq_length",
    str(NUM_TOKENS),
]
"""What a stand-in needs beside the command of the guide: two steps of short rows on one rank."""


def make(folder: Path) -> None:
    """Corpus, stand-ins of LLaMA-7B and 65B, a delta of the former, and a checkpoint of one's own."""
    from data_prep.records.shard import shard_records
    from data_prep.sample import write_sample
    from data_prep.settings import CorpusSettings
    from data_prep.tokenizer import train_tokenizer

    write_sample(folder / "dataset")
    corpus = CorpusSettings(
        instruction_tuning_data_dir=str(folder / "dataset/instruction_tuning"),
        pretraining_data_dir=str(folder / "dataset/pretraining"),
    )
    tokenizer = train_tokenizer(shard_records(corpus, folder / "cache"), 1024, folder / "cache")
    models = folder / "pretrained-models"
    for number, name in enumerate((*BASES, "my-llama")):
        _write_model(models / name, tokenizer, seed=number, scale=1.0)
    _write_model(models / DELTA, tokenizer, seed=9, scale=0.01)
    (folder / "pretrain").mkdir()
    (folder / "pretrain" / "llama-7b").symlink_to(models / BASES[0])


def _write_model(folder: Path, tokenizer: Path, seed: int, scale: float) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(seed)
    special = {f"{name}_token_id": getattr(loaded, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**ARCHITECTURE, vocab_size=len(loaded), **special), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    model.save_pretrained(folder)
    loaded.save_pretrained(folder)


def run(folder: Path, command: list[str], timeout_seconds: float = 900) -> subprocess.CompletedProcess:
    """Run a command of the guide in `folder`, offline, with this Python and this checkout."""
    programs = {"python": [sys.executable], "panda": [sys.executable, "-m", "flows.cli.main"]}
    words = [*programs.get(command[0], [command[0]]), *command[1:]]
    words = [str(ROOT / "train.py") if word == "train.py" else word for word in words]
    ours = warm.environment() if command[0] in programs else {"PYTHONPATH": str(ROOT)}
    environment = {
        **os.environ, **ours, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120",
        "PREFECT_HOME": str(new_home(folder / ".prefect")),
    }  # fmt: skip
    if words[0] == sys.executable:
        return warm.run(words, folder, environment, timeout_seconds)
    return subprocess.run(
        words, cwd=folder, env=environment, check=False, capture_output=True, text=True, timeout=timeout_seconds
    )
