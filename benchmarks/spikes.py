"""Which garbage records training names, and how many others it names or takes for spikes.

In: real corpora. A small Llama learns short pieces of them in --epochs, as a champion has. From it, runs train on
--records of the pieces once, --rows a step, as the next version does: once with --garbage among them whose texts are
letters by chance, and --clean times as they are, of other seeds and subsets. Out: the garbage named of the garbage
planted, the others named, and the spikes in clean runs. Cost: 5 minutes, and a minute a run on two cores.

    python -m benchmarks.spikes --real CORPORA
"""

import argparse
import json
import shutil
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.pipeline import Preparation, run_stages
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from tests.support import tiny

MODEL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": True,
}  # fmt: skip
LETTERS = string.ascii_letters + string.digits + "äöüßéèñçÅØ"
CHARACTERS = 120
NUM_TOKENS = 64


def main() -> None:
    """Print a line a run, and the sums."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--real", type=Path, required=True)
    options.add_argument("--epochs", type=int, default=8)
    options.add_argument("--records", type=int, default=10_000)
    options.add_argument("--garbage", type=int, default=20)
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--clean", type=int, default=20)
    given = options.parse_args()
    pieces = texts(given.real)
    print(f"{len(pieces):,} real texts, {given.records:,} a run, {given.rows} a step")
    with tempfile.TemporaryDirectory(prefix="panda-spikes-") as folder:
        root = Path(folder)
        learning = {"num_train_epochs": given.epochs, "learning_rate": 2e-3, "architecture": MODEL}
        base = train(root / "base", pieces, rows=32, **learning)
        mixed, bad = with_garbage(chosen_from(pieces, given.records, 0), given.garbage)
        run = train(root / "garbage", mixed, base / "model", given.rows)
        named, spikes = named_in(run)
        print(f"garbage: {len(spikes)} spikes, {len(named & bad)} of {len(bad)} named, {len(named - bad)} others named")
        totals = np.zeros(2, int)
        for seed in range(1, given.clean + 1):
            run = train(root / f"clean-{seed}", chosen_from(pieces, given.records, seed), base / "model", given.rows)
            named, spikes = named_in(run)
            totals += len(spikes), len(named)
            shutil.rmtree(run.parent)
        print(f"clean: {totals[0]} spikes and {totals[1]} records named in {given.clean} runs")


def texts(real: Path) -> list[str]:
    """Pieces of real texts of one length, each once."""
    pieces = set()
    for path in sorted(real.rglob("*.json*")):
        text = path.read_text(encoding="utf-8")
        records = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        for record in records:
            whole = " ".join(value for value in record.values() if isinstance(value, str))
            pieces |= {whole[at : at + CHARACTERS] for at in range(0, len(whole) - CHARACTERS, CHARACTERS)}
    return sorted(pieces)


def chosen_from(pieces: list[str], number: int, seed: int) -> list[str]:
    """So many of them."""
    return np.random.default_rng(seed).choice(pieces, number, replace=False).tolist()


def with_garbage(pieces: list[str], number: int) -> tuple[list[str], set[int]]:
    """(The pieces, so many of which are letters by chance; the lines of these)."""
    generator = np.random.default_rng(0)
    bad = set((generator.choice(len(pieces), number, replace=False) + 1).tolist())
    for line in bad:
        pieces[line - 1] = "".join(generator.choice(list(LETTERS), CHARACTERS // 2))
    return pieces, bad


def train(root: Path, pieces: Sequence[str], model_dir: Path | None = None, rows: int = 8, **settings: Any) -> Path:
    """Train on each piece once; returns the run directory."""
    (root / "documents").mkdir(parents=True)
    lines = [json.dumps({"text": str(text)}, ensure_ascii=False) + "\n" for text in pieces]
    (root / "documents" / "all.jsonl").write_text("".join(lines), encoding="utf-8")
    corpus = CorpusSettings(
        instruction_tuning_data_dir=None, pretraining_data_dir=str(root / "documents"), validation_fraction=0,
        quarantine=None, tombstones=None,
    )  # fmt: skip
    pack = PackSettings(max_seq_length=NUM_TOKENS, packing=False)
    stages = Preparation(corpus, TokenizeSettings(), pack, model_dir, root / "cache", vocab_size=MODEL["vocab_size"])
    plan = run_stages(stages)
    config = {
        "plan_dir": plan.path, "packing": False, "on_spike": "skip", "per_gpu_train_batch_size": rows,
        "gradient_accumulation_steps": 1, "max_steps": -1, "save_steps": 10**6, "learning_rate": 5e-5,
        "warmup_steps": 50, "lr_scheduler": "cosine", "max_grad_norm": 1.0, **settings,
    }  # fmt: skip
    run_dir = tiny.write_run(root, model_dir=model_dir, **config)
    written = run_dir / "config.yaml"
    written.write_text(written.read_text().replace(str(root / "tokenizer"), plan.tokenizer_dir))
    codes = tiny.wait(tiny.start(run_dir, 1), seconds=3600)
    assert not any(codes), tiny.logs(run_dir)
    lines_of_steps = tiny.metrics(run_dir)
    last = np.mean([line["loss"] for line in lines_of_steps[-50:]])
    named, spikes = named_in(run_dir)
    said = "; ".join(f"step {spike['step']}: {spike['says']}" for spike in spikes[:3])
    print(
        f"{root.name}: {len(lines_of_steps)} steps, loss {lines_of_steps[0]['loss']:.2f} to {last:.2f}, "
        f"{len(spikes)} spikes, {len(named)} named; {said}",
        flush=True,
    )
    return run_dir


def named_in(run_dir: Path) -> tuple[set[int], list[Any]]:
    """(Lines of the records that training has named, the spikes)."""
    spikes = tiny.metrics(run_dir, "spikes.jsonl")
    steps = [*spikes, *tiny.metrics(run_dir, "standing_out.jsonl")]
    return {record["line"] for step in steps for record in step["records"]}, spikes


if __name__ == "__main__":
    main()
