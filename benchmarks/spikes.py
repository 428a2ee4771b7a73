"""Which garbage records the spike detector names, and how often it finds a spike where there is none.

In: real corpora. --records of them, cut to short ones, are trained on once, --rows a step, by a small Llama from random
weights: once with --garbage records among them whose answers are letters by chance, and in --clean runs of other seeds
and subsets as they are. Out: the garbage named of the garbage planted, the others named, and the spikes in clean runs.
Cost: a minute a run on two cores.

    python -m benchmarks.spikes --real CORPORA
"""

import argparse
import json
import string
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.pipeline import prepare
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from tests.support import tiny

MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": True,
}  # fmt: skip
LETTERS = string.ascii_letters + string.digits + "äöüßéèñçÅØ"
CHARACTERS = 120
NUM_TOKENS = 64


def main() -> None:
    """Print a line a run, and the sums."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--real", type=Path, required=True)
    options.add_argument("--records", type=int, default=10_000)
    options.add_argument("--garbage", type=int, default=20)
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--clean", type=int, default=20)
    given = options.parse_args()
    answers = texts(given.real)
    print(f"{len(answers):,} real texts, {given.records:,} in a run, {given.rows} a step")
    with tempfile.TemporaryDirectory(prefix="panda-spikes-") as folder:
        root = Path(folder)
        spikes, bad = run(root / "garbage", answers, given, seed=0, garbage=given.garbage)
        named = {record["line"] for spike in spikes for record in spike["records"]}
        print(f"garbage: {len(spikes)} spikes, {len(named & bad)} of {len(bad)} named, {len(named - bad)} others named")
        found = [len(run(root / f"clean-{seed}", answers, given, seed, 0)[0]) for seed in range(1, given.clean + 1)]
        print(f"clean: {sum(found)} spikes in {len(found)} runs")


def texts(real: Path) -> list[str]:
    """Pieces of real texts of one length, each once."""
    pieces = set()
    for path in sorted(real.rglob("*.json*")):
        text = path.read_text(encoding="utf-8")
        records = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        for record in records:
            whole = " ".join(value for value in record.values() if isinstance(value, str)) if record else ""
            pieces |= {whole[at : at + CHARACTERS] for at in range(0, len(whole) - CHARACTERS, CHARACTERS)}
    return sorted(pieces)


def run(
    root: Path, answers: list[str], given: argparse.Namespace, seed: int, garbage: int
) -> tuple[list[Any], set[int]]:
    """(Spikes, lines of the garbage) of one training."""
    generator = np.random.default_rng(seed)
    chosen = [answers[index] for index in generator.choice(len(answers), given.records, replace=False)]
    bad = set((generator.choice(given.records, garbage, replace=False) + 1).tolist())
    for line in bad:
        letters = generator.choice(list(LETTERS), CHARACTERS // 2)
        chosen[line - 1] = "".join(letters)
    (root / "documents").mkdir(parents=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen]
    (root / "documents" / "all.jsonl").write_text("".join(lines), encoding="utf-8")
    corpus = CorpusSettings(
        instruction_tuning_data_dir=None, pretraining_data_dir=str(root / "documents"), validation_fraction=0,
        quarantine=None, tombstones=None,
    )  # fmt: skip
    pack = PackSettings(max_seq_length=NUM_TOKENS, packing=False)
    plan = prepare(corpus, TokenizeSettings(), pack, None, root / "cache")
    config = {
        "plan_dir": plan.path, "architecture": MODEL, "seed": seed, "packing": False, "on_spike": "skip",
        "per_gpu_train_batch_size": given.rows, "gradient_accumulation_steps": 1, "max_steps": -1, "save_steps": 10**6,
        "learning_rate": 1e-3, "warmup_steps": 50, "lr_scheduler": "cosine", "max_grad_norm": 1.0,
    }  # fmt: skip
    run_dir = tiny.write_run(root, **config)
    settings = run_dir / "config.yaml"
    settings.write_text(settings.read_text().replace(str(root / "tokenizer"), plan.tokenizer_dir))
    codes = tiny.wait(tiny.start(run_dir, 1), seconds=3600)
    assert not any(codes), tiny.logs(run_dir)
    lines_of_steps = tiny.metrics(run_dir)
    spikes = tiny.metrics(run_dir, "spikes.jsonl")
    last = np.mean([line["loss"] for line in lines_of_steps[-50:]])
    said = "; ".join(f"step {spike['step']}: {spike['says']}, {len(spike['records'])} named" for spike in spikes[:3])
    print(f"seed {seed}: {len(lines_of_steps)} steps, loss to {last:.2f}, {len(spikes)} spikes; {said}", flush=True)
    return spikes, bad


if __name__ == "__main__":
    main()
