"""What people give a preparation, meaning harm or not: bombs, code that raises, lies or hangs, any settings.

In: a seed. Out: a `Round`: an answer that says what to do, or every record with a verdict; memory within its limit.
Cost: a second a case, and 0.1 s a configuration.
"""

import gzip
import json
import os
import random
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.chaos.findings import Round
from configs.field_types import kind_of
from configs.load import load
from configs.settings import PandaSettings
from data_prep import targets
from data_prep.errors import PandaError
from data_prep.pipeline import prepare
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from tests.support.tokenizers import bytes_core, save

NUM_GOOD = 50
GOOD = "".join(json.dumps({"input": f"q {i}", "target": f"a {i}"}) + "\n" for i in range(NUM_GOOD)).encode()
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
            _every_record_has_a_verdict(found, done.report, name)
            kept = done.report["accepted"]
            found.expect(kept >= NUM_GOOD, "lost", f"{name}: of {NUM_GOOD} good records {kept} are there")
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
    """A user's reader and template that raise, lie or hang: an error that names them, or a verdict for every record."""
    draw, found = random.Random(seed), Round()
    module, before = f"somebody_{seed}", os.getcwd()
    longest, targets.LONGEST_SECONDS = targets.LONGEST_SECONDS, 1
    with tempfile.TemporaryDirectory(dir=ground) as folder:
        data = Path(folder, "corpus")
        data.mkdir()
        (data / "a.jsonl").write_bytes(GOOD)
        Path(folder, f"{module}.py").write_text(SOMEBODYS)
        os.chdir(folder)
        sys.path.insert(0, folder)
        try:
            for setting, how in _own_code(draw):
                found.tried += 1
                node = {"_target_": f"{module}.{setting}", "how": how}
                what, place = f"{setting} {how!r}", Path(tempfile.mkdtemp(dir=folder))
                # `typed` calls it before the loop goes on
                done = found.typed(what, lambda: _with_own_code(data, place, setting, node))  # noqa: B023
                if done:
                    _every_record_has_a_verdict(found, done.report, what)
        finally:
            sys.path.remove(folder)
            os.chdir(before)
            targets.LONGEST_SECONDS = longest
    return found


SOMEBODYS = """
import time


def reader(path, how):
    if how == "hang":
        time.sleep(1000)
    if how.startswith("raise "):
        raise eval(how[6:])("somebody's own")
    if how.startswith("later "):
        return _later(eval(how[6:]))
    return eval(how)


def _later(error):
    yield {"input": "a", "target": "b"}
    raise error("somebody's own, later")


def template(messages, how):
    while how == "hang":
        pass
    if how.startswith("raise "):
        raise eval(how[6:])("somebody's own")
    return eval(how)
"""
ERRORS = ("ValueError", "KeyError", "RuntimeError", "RecursionError", "MemoryError", "OSError", "UnicodeError")
NO_RECORDS = ("None", "7", "'text'", "b'bytes'", "[1, 2]", "[{'input': 1}]", "[object()]", "{'a': 1}", "[None]",
              "[[[]]]", "[{'input': 'a', 'target': 1e999}]", "[{'input': chr(0xd800), 'target': 'a'}]")  # fmt: skip
NO_SEGMENTS = ("None", "3", "'ab'", "[('a',)]", "[('a', 'yes')]", "[(1, True)]", "[('', True)]", "[('a', False)]",
               "[object()]", "[]", "[(chr(0xd800), True)]", "[('a', True)] * 3")  # fmt: skip


def _own_code(draw: random.Random) -> list[tuple[str, str]]:
    """(Setting, how it goes wrong)."""
    error = draw.choice(ERRORS)
    wrong = {"reader": [f"later {error}", draw.choice(NO_RECORDS)], "template": [draw.choice(NO_SEGMENTS)]}
    return [(name, how) for name, special in wrong.items() for how in (f"raise {error}", *special, "hang")]


def _with_own_code(data: Path, folder: Path, setting: str, node: dict[str, Any]) -> Any:
    """That the node is refused would show nothing."""
    try:
        return _prepared(data, folder, **{setting: node})
    except PandaError as error:
        assert "may not be named" not in str(error), error
        raise


def _every_record_has_a_verdict(found: Round, report: dict[str, Any], what: str) -> None:
    counted = report["accepted"] + sum(report["rejected"].values()) + sum(report["dropped"].values())
    found.expect(report["records_in"] == counted, "lost", f"{what}: {report}")


def configurations(seed: int, ground: Path, number: int = CONFIGURATIONS) -> Round:
    """Any settings with any values, as flags, in a file, as overrides: settings, or one error with all problems."""
    draw, found = random.Random(seed), Round()
    names = sorted(PandaSettings.model_fields)
    with tempfile.TemporaryDirectory(dir=ground) as folder:
        for one in range(number):
            chosen = {name: _value(draw, name) for name in draw.sample(names, draw.randrange(1, 6))}
            flags = {name: chosen[name] for name in chosen if draw.random() < 0.5}
            file = Path(folder, f"{one}.yaml")
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
