"""What each rank holds in memory while it loads a model and makes steps: its share, and one tensor.

``python -m benchmarks.memory_of_ranks [--layers 24] [--ranks 4] [--only WAY ...]``. In: nothing. Out: a table, the peak
of anonymous memory of each rank (`smaps_rollup`, looked at every 20 ms; pages mapped from files do not count) until it
has loaded and until it has made two steps; the exit code is 1 when a sharded way takes more than its share of the
float32 weights and 1 GB. The model is a random Llama in shards in a temporary directory: 1.1 billion float32
parameters, 4.4 GB; ``--layers 3`` for a quick look. ZeRO 2 holds the weights whole, for comparison. Needs 12 GB of
memory, 2 minutes a way.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

LORA = {"use_lora": True, "lora_r": 8}
WAYS: dict[str, dict[str, Any]] = {
    "LoRA, ZeRO 2": {**LORA, "zero_stage": 2},
    "LoRA, ZeRO 3": {**LORA, "zero_stage": 3},
    "LoRA, FSDP": {**LORA, "strategy": "fsdp"},
    "4 bits, ZeRO 2": {**LORA, "use_quant": True, "zero_stage": 2},
    "4 bits, ZeRO 3": {**LORA, "use_quant": True, "zero_stage": 3},
    "4 bits, FSDP": {**LORA, "use_quant": True, "strategy": "fsdp"},
}
BEYOND = 1e9
SHARD_BYTES = 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rank", nargs=2, metavar=("WAY", "ROOT"), help="what this program starts itself with")
    arguments = parser.parse_args()
    if arguments.rank:
        one_rank(arguments.rank[0], Path(arguments.rank[1]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write_model(root, arguments.layers, arguments.vocabulary)
        share = size / arguments.ranks
        print(
            f"weights {size / 1e9:.2f} GB, a share {share / 1e9:.2f}; limit of a rank {(share + BEYOND) / 1e9:.2f} GB"
        )
        print(f"{'':16}{'loaded':>24}{'after two steps':>36}")
        fits = [shown(way, root, arguments.ranks, share + BEYOND) for way in arguments.only]
    return 0 if all(fits) else 1


def write_model(root: Path, layers: int, vocabulary: int) -> int:
    """A random Llama and a tokenizer; returns the bytes of its weights. A shard is made and written at a time."""
    from tests.support.tiny_models import save_tokenizer

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    config.save_pretrained(root)
    save_tokenizer(root)
    shard: dict[str, torch.Tensor] = {}
    size, number = 0, 0
    for name, shape in shapes.items():
        shard[name] = torch.ones(shape) if len(shape) == 1 else torch.randn(shape).mul_(0.02)
        size += shard[name].nbytes
        if sum(value.nbytes for value in shard.values()) > SHARD_BYTES or name == list(shapes)[-1]:
            save_file(shard, root / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
            shard, number = {}, number + 1
    write_index(root)
    return size


def write_index(root: Path) -> None:
    import json

    from training.models.shards import INDEX, tensors_of

    places = {name: info.file.name for name, info in tensors_of(root).items()}
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def shown(way: str, root: Path, num_ranks: int, limit: float) -> bool:
    """Print a line of the table; whether every rank held its share only, where it should."""
    loaded, stepped = peaks(way, root, num_ranks)
    print(f"{way:16}{as_text(loaded):>24}{as_text(stepped):>36}", flush=True)
    return "ZeRO 2" in way or max(stepped) < limit


def as_text(values: list[float]) -> str:
    return " ".join(f"{value / 1e9:.2f}" for value in values) + " GB"


def peaks(way: str, root: Path, num_ranks: int) -> tuple[list[float], list[float]]:
    """Peak of each rank, until it has loaded and in all."""
    from tests.support.tiny import free_port
    from training.launch.commands import GIVEN_BACK_BYTES

    for old in root.glob("loaded-*"):
        old.unlink()
    port = str(free_port())
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared["MALLOC_MMAP_THRESHOLD_"] = str(GIVEN_BACK_BYTES)  # as the launcher does
    processes = []
    for rank in range(num_ranks):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "benchmarks.memory_of_ranks", "--rank", way, str(root)]
        with (root / f"log-{rank}").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    loaded, stepped = [0.0] * num_ranks, [0.0] * num_ranks
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            stepped[rank] = max(stepped[rank], anonymous(process.pid))
            if not (root / f"loaded-{rank}").exists():
                loaded[rank] = stepped[rank]
        time.sleep(0.02)
    if any(process.returncode for process in processes):
        raise SystemExit((root / "log-0").read_text()[-3000:])
    return loaded, stepped


def anonymous(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:")), 0.0)


def one_rank(way: str, root: Path) -> None:
    """Load, say so, make two steps."""
    from training.devices import load_dtype
    from training.distributed import join, leave, this_rank
    from training.engines.build import build_engine
    from training.models.build import empty_model
    from training.models.loss import CausalLMLoss
    from training.settings import TrainSettings
    from training.trainer.packing_check import pack, random_segments

    settings = TrainSettings(**WAYS[way])
    ranks = this_rank()
    join(ranks)
    model, values = empty_model(settings, str(root), str(root), load_dtype(settings, ranks.device))
    engine = build_engine(CausalLMLoss(model), settings, ranks, values)
    del model
    ranks.barrier()
    (root / f"loaded-{ranks.rank}").touch()
    batch = pack([random_segments(300)])
    for _ in range(2):
        engine.backward(engine.forward(batch)[0] / len(batch.targets), last=True)
        assert engine.step(1e-4) > 0
    leave()


if __name__ == "__main__":
    sys.exit(main())
