"""What people give a preparation without meaning harm, or meaning it: bombs, code that raises or lies, any settings.

In: a seed. Out: a `Round`: an answer that says what to do, or every record with a verdict; memory within its limit.
Cost: a second a case, and 20 ms a configuration.
"""

import gzip
import json
import random
import resource
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.chaos.findings import Round
from configs.field_types import kind_of
from configs.load import load
from configs.settings import PandaSettings
from data_prep.errors import PandaError
from data_prep.pipeline import prepare
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from tests.support.tokenizers import bytes_core, save

GOOD = b'{"input": "q", "target": "a"}\n' * 50
MEMORY_MB = 800  # above what was used before: a record of 64 MiB is held a few times
CONFIGURATIONS = 40
ODD: list[Any] = [
    None, True, -1, 0, 1, 2**63, 1e400, float("nan"), "", " ", "null", "${oc.env:HOME}", "a\0b", "../..", "/dev/null",
    "😀" * 50, [], [1, "a", None], {}, {"a": {"b": []}}, {"_target_": "os.system"}, {"_target_": "tests.nothing.there"},
    [[[]]],
]  # fmt: skip


def bombs(seed: int, ground: Path) -> Round:
    """Small files that become large, deep or endless, beside good ones: they are set aside, in bounded memory."""
    draw, found = random.Random(seed), Round()
    name, content = draw.choice(list(_bombs(draw)))
    with tempfile.TemporaryDirectory(dir=ground) as folder:
        data = Path(folder, "corpus")
        data.mkdir()
        (data / "good.jsonl").write_bytes(GOOD)
        (data / name).write_bytes(content())
        before = _peak_mb()
        found.tried += 1
        done = found.typed(f"a corpus with {name}", lambda: _prepared(data, Path(folder), max_rejected_fraction=1.0))
        used = _peak_mb() - before
        found.expect(used < MEMORY_MB, "wrong", f"{name}: {used:.0f} MB more memory")
        if done:
            report = done.report
            counted = report["accepted"] + sum(report["rejected"].values()) + sum(report["dropped"].values())
            found.expect(report["records_in"] == counted, "lost", f"{name}: {report}")
            kept = report["accepted"] + report["dropped"].get("duplicate", 0)
            found.expect(kept >= 50, "lost", f"{name}: of 50 good records {kept} are there")
    return found


def _bombs(draw: random.Random) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """File name -> its bytes."""
    size, depth = draw.choice((70, 150)) << 20, draw.choice((1_000, 100_000, 1_000_000))
    yield "zeros.jsonl.gz", lambda: gzip.compress(bytes(size), 1)
    yield "one-text.jsonl.gz", lambda: gzip.compress(b'{"text": "' + b"a" * size + b'"}\n', 1)
    yield "lines.jsonl.gz", lambda: gzip.compress(b"\n" * (size // 8), 1)
    yield "twice.jsonl.gz", lambda: gzip.compress(gzip.compress(bytes(size), 1), 1)
    yield "lists.jsonl", lambda: b"[" * depth + b"\n"
    yield "objects.jsonl", lambda: b'{"a":' * depth + b"\n"
    yield "closed.jsonl", lambda: b'{"input": ' + b"[" * depth + b"]" * depth + b', "target": "x"}\n'
    yield "number.jsonl", lambda: b'{"input": "a", "target": ' + b"9" * depth + b"}\n"
    yield "keys.jsonl", lambda: json.dumps({f"k{i}": i for i in range(min(depth, 100_000))}).encode() + b"\n"


def own_code(seed: int, ground: Path) -> Round:
    """A reader and a template of the user's that raise or lie: an error that names them, or records with verdicts."""
    draw, found = random.Random(seed), Round()
    module = types.ModuleType("benchmarks.chaos.somebody")
    sys.modules[module.__name__] = module
    with tempfile.TemporaryDirectory(dir=ground) as folder:
        data = Path(folder, "corpus")
        data.mkdir()
        (data / "a.jsonl").write_bytes(GOOD)
        for name, change in _own_code(draw):
            module.it = change  # type: ignore[attr-defined]
            change.__module__, change.__qualname__, change.__name__ = module.__name__, "it", "it"
            node = {"_target_": f"{module.__name__}.it"}
            found.tried += 1
            place = Path(tempfile.mkdtemp(dir=folder))
            found.typed(f"{name} in seed {seed}", lambda: _prepared(data, place, **{name: node}))  # noqa: B023
    del sys.modules[module.__name__]
    return found


def _own_code(draw: random.Random) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Setting -> a function."""
    error = draw.choice((ValueError, KeyError, RuntimeError, RecursionError, MemoryError, OSError, StopIteration))
    nonsense = draw.choice((None, 7, "text", b"bytes", [1, 2], [{"input": 1}], [object()], {"a": 1}, [None], [[[]]]))
    pairs = draw.choice(
        (None, 3, "ab", [("a",)], [("a", "yes")], [(1, True)], [("", True)], [("a", False)], [object()])
    )

    def raises(*_: Any, **__: Any) -> Any:
        raise error("somebody's own")

    def raises_later(*_: Any, **__: Any) -> Any:
        yield {"input": "a", "target": "b"}
        raise error("somebody's own, later")

    yield "reader", raises
    yield "reader", raises_later
    yield "reader", lambda *_, **__: nonsense
    yield "template", raises
    yield "template", lambda *_, **__: pairs


def configurations(seed: int, ground: Path) -> Round:
    """Any settings with any values, as flags, in a file, as overrides: settings, or one error with all problems."""
    draw, found = random.Random(seed), Round()
    names = sorted(PandaSettings.model_fields)
    with tempfile.TemporaryDirectory(dir=ground) as folder:
        for number in range(CONFIGURATIONS):
            chosen = {name: _value(draw, name) for name in draw.sample(names, draw.randrange(1, 6))}
            flags = {name: chosen[name] for name in chosen if draw.random() < 0.5}
            file = Path(folder, f"{number}.yaml")
            file.write_text(_yaml({name: chosen[name] for name in chosen if name not in flags}), encoding="utf-8")
            found.tried += 1
            found.typed(f"{chosen}", lambda: load(flags, [], str(file)))  # noqa: B023  # called at once
    return found


def _value(draw: random.Random, name: str) -> Any:
    kind = kind_of(name)
    usual = {int: draw.randrange(-3, 1 << 40), float: draw.uniform(-1, 9), bool: draw.random() < 0.5, str: "a"}
    return draw.choice((draw.choice(ODD), usual.get(kind, "x") if isinstance(kind, type) else "x"))


def _yaml(content: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(content, allow_unicode=True)


def _prepared(data: Path, folder: Path, **settings: Any) -> Any:
    """What a preparation of this corpus makes; a `PandaError` where it cannot."""
    tokenizer = folder / "tokenizer"
    save(bytes_core(), tokenizer, bos_token="<s>")
    corpus = {"instruction_tuning_data_dir": str(data), "pretraining_data_dir": None, "prepare_workers": 0} | {
        name: value for name, value in settings.items() if name in CorpusSettings.model_fields
    }
    tokens = {name: value for name, value in settings.items() if name in TokenizeSettings.model_fields}
    try:
        made = CorpusSettings.model_validate(corpus), TokenizeSettings.model_validate(tokens)
    except ValueError as error:
        raise PandaError(str(error)) from error  # `configs.load` makes one of it
    return prepare(*made, PackSettings(max_seq_length=64), tokenizer, folder / "cache")


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
