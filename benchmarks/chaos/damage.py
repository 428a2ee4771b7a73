"""A damaged file in prepared data, of every kind in turn: it is named before it is used, and made again, alone.

In: a seed. Out: a `Round`: one accident (a bit, a hole, a cut, bytes too many, nothing left, or the file gone) to one
file of the cache; then `panda verify` names it, whoever opens the plan is refused or gets the right rows, and a
preparation ends in the bytes of one undisturbed. Cost: half a second an accident.
"""

import json
import random
import shutil
from pathlib import Path

import numpy as np

from benchmarks.chaos.findings import Round
from benchmarks.chaos.mutate import damaged
from data_prep import intact, store
from data_prep.errors import PandaError
from data_prep.pipeline import prepare
from data_prep.plan.reader import open_plan
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from tests.support.tokenizers import bytes_core, save

RECORDS = 200
ACCIDENTS = 6


def damage_cache(seed: int, ground: Path, accidents: int = ACCIDENTS) -> Round:
    """Some accidents, each to a fresh copy."""
    draw, found = random.Random(seed), Round()
    whole = ground / "cache-whole"
    plan = Path(_prepare(ground, whole)).name
    expected = _contents(whole)
    for _ in range(accidents):
        cache = ground / "cache-damaged"
        shutil.copytree(whole, cache)
        name = draw.choice(sorted(expected))
        change = _accident(draw, cache / name)
        if change:
            found.tried += 1
            _look(found, cache, name, change)
            _use(found, cache / "plans" / plan, whole / "plans" / plan, f"{name} {change}")
            found.typed(f"prepare with {name} {change}", lambda: _prepare(ground, cache))  # noqa: B023  # called at once
            made = _contents(cache)
            other = [one for one in expected if made.get(one) != expected[one]]
            found.expect(not other, "wrong", f"{name} {change}: a preparation leaves {other}")
        shutil.rmtree(cache)
    return found


def _accident(draw: random.Random, path: Path) -> str:
    """What was done; empty if the bytes are as before."""
    before = path.read_bytes()
    if draw.random() < 0.2:
        path.unlink()
        return "removed"
    after = damaged(draw, before)
    path.write_bytes(after)
    return f"damaged ({len(before)} to {len(after)} bytes)" if after != before else ""


def _look(found: Round, cache: Path, name: str, change: str) -> None:
    """`panda verify` names the file; where its manifest is what was damaged, that."""
    verified = found.typed(f"verify of {name} {change}", lambda: store.verify_cache(cache))
    named = {str(Path(path, one).relative_to(cache)) for path, names in verified.damaged.items() for one in names}
    found.expect(name in named, "wrong", f"{name} {change}: verify names {sorted(named)}")


def _use(found: Round, plan_dir: Path, right: Path, what: str) -> None:
    """A run that begins looks at hashes; then it reads rows."""
    try:
        manifest = store.open_manifest(plan_dir)
        shards = [(plan_dir / shard).resolve() for shard in manifest["shards"]]
        intact.require_intact(plan_dir.parent.parent, [plan_dir, *shards])
        rows, expected = (open_plan(one, "train").batch(np.array([0, 1])) for one in (plan_dir, right))
        found.expect((rows.input_ids == expected.input_ids).all(), "wrong", f"{what}: trained on other rows")
    except PandaError as error:
        found.expect(str(plan_dir.parent.parent) in str(error), "untyped", f"{what}: the error names no file: {error}")
    except Exception as error:
        found.found("untyped", f"{what}: {type(error).__name__}: {str(error)[:160]}")


def _prepare(ground: Path, cache: Path) -> str:
    data, tokenizer = ground / "corpus", ground / "tokenizer-of-bytes"
    if not data.exists():
        data.mkdir()
        save(bytes_core(), tokenizer, bos_token="<s>")
        for number in range(2):
            records = [{"input": f"question {number} {i}", "target": f"answer {i} " * 3} for i in range(RECORDS)]
            lines = [*map(json.dumps, records), "{broken"]
            (data / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    corpus = CorpusSettings(
        instruction_tuning_data_dir=str(data), pretraining_data_dir=None, prepare_workers=0, validation_fraction=0.1
    )
    return prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=64), tokenizer, cache).path


def _contents(cache: Path) -> dict[str, str]:
    """File -> hash; not of what is only remembered about them."""
    files = (path for path in sorted(cache.glob("*/*/*")) if path.is_file())
    return {str(path.relative_to(cache)): store.hash_file(path) for path in files}
