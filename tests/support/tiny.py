"""A tiny tokenizer, corpus and run directory for the tests of training, and real ranks over gloo."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support import warm
from tests.support.plans import example, write_plan
from training.launch.processes import free_port

ROOT = Path(__file__).parents[2]
USERS_PROJECT = ROOT / "tests" / "users_project"
VOCABULARY = 64
BOS, EOS, PAD = 0, 1, 2
ARCHITECTURE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def write_tokenizer(directory: Path) -> Path:
    """A word-level tokenizer of VOCABULARY words."""
    directory.mkdir(parents=True)
    words = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def counting_examples(number: int, seed: int = 0) -> list:
    """Learnable examples: a prompt of two words, an answer that counts on from them, eos."""
    generator = np.random.default_rng(seed)
    examples = []
    for _ in range(number):
        start, step = int(generator.integers(3, 40)), int(generator.integers(1, 3))
        length = int(generator.integers(3, 9))
        words = [start + step * i for i in range(length + 2)]
        examples.append(example([BOS, *words[:2]], [*words[2:], EOS]))
    return examples


def write_counting_plan(root: Path, num_rows: int = 37, max_seq_length: int = 32, segments: int = 2) -> Path:
    """Rows of a few examples each; the last quarter of the examples is held out. Two sources."""
    total = (num_rows + num_rows // 4) * segments
    examples = counting_examples(total)
    segment = [(i, 0, len(examples[i][0])) for i in range(total)]
    rows = [segment[start : start + segments] for start in range(0, total, segments)]
    return write_plan(
        root, examples, max_seq_length=max_seq_length, rows=rows[:num_rows], validation=rows[num_rows:],
        example_sources=[i % 2 for i in range(total)], sources=["instruction", "pretraining"], pad_id=PAD,
    )  # fmt: skip


def write_run(root: Path, name: str = "run", model_dir: Path | None = None, **settings: Any) -> Path:
    """A run directory with config.yaml; tokenizer and plan are made once per root. Returns the run directory."""
    tokenizer = root / "tokenizer"
    if not tokenizer.exists():
        write_tokenizer(tokenizer)
    run_dir = root / name
    run_dir.mkdir()
    config = {
        "architecture": None if model_dir else ARCHITECTURE,
        "seed": 7, "learning_rate": 0.01, "warmup_steps": 2, "lr_scheduler": "cosine", "max_grad_norm": 1.0,
        "per_gpu_train_batch_size": 2, "gradient_accumulation_steps": 2, "packing": True, "max_steps": 6,
        "paths": {
            "plan_dir": str(settings.pop("plan_dir", None) or write_counting_plan(root / "cache")),
            "tokenizer_dir": str(tokenizer), "model_dir": model_dir and str(model_dir), "run_dir": str(run_dir),
        },
        **settings,
    }  # fmt: skip
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    return run_dir


def start(run_dir: Path, world_size: int, *arguments: str, module: str = "training.worker") -> list[warm.Process]:
    """Ranks with the environment the launcher gives them; output goes to RUN/rank-N.log."""
    port = free_port()
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "PYTHONPATH": f"{ROOT}:{USERS_PROJECT}", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        command = ["--config", str(run_dir / "config.yaml"), *arguments]
        processes.append(warm.ranks().start(module, command, environment, run_dir / f"rank-{rank}.log"))
    return processes


def wait(processes: list[warm.Process], seconds: float = 120) -> list[int]:
    """Exit codes; kills what is left when time is up."""
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train(run_dir: Path, world_size: int = 2, *arguments: str) -> list[dict[str, Any]]:
    """Run to the end; returns the lines of metrics.jsonl. A failure shows rank 0's log."""
    codes = wait(start(run_dir, world_size, *arguments))
    assert codes == [0] * world_size, logs(run_dir)
    return metrics(run_dir)


def logs(run_dir: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(run_dir.glob("rank-*.log")))


def metrics(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]
