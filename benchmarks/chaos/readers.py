"""Every reader of bytes that come from outside or lie on a disk, as a function of bytes: what the fuzzer feeds.

In: bytes, a folder to write them to. Out: nothing. A `PandaError` (or the reader's own refusal) is an answer; `Wrong`
says that what was read is not what stands there; every other exception is a fault of the reader.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.load import load, parse_yaml
from data_prep.errors import PandaError
from data_prep.owner import FILE as OWNER_FILE
from data_prep.owner import owner
from data_prep.plan import tombstones
from data_prep.records.json_stream import read_blocks
from data_prep.records.normalise import Rejected, content_hash, decode, normalise
from data_prep.records.source import Piece, Source
from data_prep.store import MANIFEST, open_manifest
from data_prep.tokenizer import load_tokenizer
from training.comparison.job import read_job
from training.launch.events import event_of
from training.launch.run_config import read_config
from training.serving.request import ApiError, ChatRequest, CompletionRequest, parse_request
from training.tracking import run_record
from training.trainer.checkpoint import read_marker
from training.trainer.state_files import read_index

SEPARATORS = b"[], \t\r\n\f\v\xef\xbb\xbf"
RECORDS = (
    b'[{"input": "a", "target": "b"}, {"title": "t", "content": "\\u4f60"}]',
    b'{"instruction": "x", "input": "", "output": "y"}\n{"text": "z"}\n',
    b'{"messages": [{"role": "user", "content": "q"}, {"role": "gpt", "content": [{"type": "text", "text": "a"}]}]}',
    b'{\n "input": "1",\n "target": "2"\n}\n{\n "input": "3",\n "target": "4"\n}',
    b'[[{"input": "a", "target": "b"}],\n [{"from": "human", "value": "c"}]]',
)  # fmt: skip
CONFIG = b"max_seq_length: 64\nlearning_rate: 3e-4\narchitecture: {hidden_size: 32}\nreader: null\nsources: {a: 1.0}\n"
RUN_CONFIG = b"max_steps: 3\npacking: true\npaths: {plan_dir: p, tokenizer_dir: t, model_dir: null, run_dir: r}\n"
TOKENIZER = (
    b'{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0,"content":"</s>","single_word":false,'
    b'"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":null,"pre_tokenizer":null,'
    b'"post_processor":null,"decoder":null,"model":{"type":"WordLevel","vocab":{"</s>":0,"a":1},"unk_token":"a"}}'
)
MARKER = (
    b'{"format_version": 2, "progress": {"step": 3}, "ranks": 1, "files": {"state-00000-00000.safetensors": '
    b'{"bytes": 64, "xxh3": "00"}}}'
)
JOB = b'{"gate": {}, "cache_dir": "c", "candidate": {"name": "n", "template": "plain", "model_dir": "m"}}'
RECORD = (
    b'{"experiment": "e", "run_name": "r", "uri": "u", "params": {}, "tags": {}, "datasets": [], "owner": '
    b'{"host": "h", "pid": 1, "started": 1.0}}'
)
CHAT = (
    b'{"model": "m", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": '
    b'[{"type": "text", "text": "a"}]}], "max_tokens": 3, "temperature": 0.5, "stop": ["x"], "n": 1, "stream": true}'
)
TOMBSTONES = b'{"hash": "00112233445566778899aabbccddeeff", "note": "n"}\n'


class Wrong(Exception):
    """What was read is not what stands there."""


@dataclass(frozen=True)
class Reader:
    """A reader and inputs it takes. `refuses`: its answer to bad bytes; `slow`: an input takes 0.1 s, not 0.001 s."""

    read: Callable[[bytes, Path], Any]
    seeds: tuple[bytes, ...]
    refuses: tuple[type[Exception], ...] = (PandaError,)
    slow: bool = False


def read_json_file(data: bytes, folder: Path) -> None:
    """Every byte is part of a record or a separator; places are right; of valid JSON nothing is missing."""
    path = folder / "a.json"
    path.write_bytes(data)
    end, records = 0, []
    for block in read_blocks(Source(Piece(str(path)))):
        places = zip(block.records, block.offsets.tolist(), block.lengths.tolist(), block.lines.tolist(), strict=True)
        for index, (record, offset, length, line) in enumerate(places):
            if offset < end or data[offset : offset + length] != bytes(record):
                raise Wrong(f"a record at {offset} of {length} bytes is not what stands there")
            if data[end:offset].strip(SEPARATORS):
                raise Wrong(f"bytes {end} to {offset} are in no record: {data[end:offset][:60]!r}")
            if line != 1 + data.count(b"\n", 0, offset):
                raise Wrong(f"the record at {offset} is said to be in line {line}")
            end = offset + length
            if index not in block.faults:
                records.append(bytes(record))
    if data[end:].strip(SEPARATORS):
        raise Wrong(f"bytes from {end} on are in no record: {data[end:][:60]!r}")
    _same_as_json(data, records)


def _same_as_json(data: bytes, records: list[bytes]) -> None:
    """Where the whole file is one JSON array of objects, its elements are the records."""
    try:
        whole = json.loads(data.decode("utf-8"), parse_constant=int)
    except (ValueError, RecursionError):
        return
    if not isinstance(whole, list) or not whole or not all(isinstance(element, dict) for element in whole):
        return
    try:
        found = [json.loads(record) for record in records]
    except (ValueError, RecursionError) as error:
        raise Wrong(f"an element of a valid array is no JSON: {error}") from error
    if found != whole:
        raise Wrong(f"a valid array of {len(whole)} objects gives {len(found)} others")


def read_record(data: bytes, _: Path) -> None:
    """A record is normal, or refused with a reason; both twice the same."""
    for kind in ("instruction", "pretraining"):
        with suppress(Rejected):
            first = normalise(decode(data), kind)
            if content_hash(*first) != content_hash(*normalise(decode(data), kind)):
                raise Wrong("the same bytes have two hashes")
            if len(first[0]) != len(first[1]) or not all(isinstance(text, str) for text in first[1]):
                raise Wrong(f"roles and texts do not fit: {first}")


def in_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    """The reader of a file of this name."""

    def read_bytes(data: bytes, folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        read(path)

    return read_bytes


def read_overrides(data: bytes, _: Path) -> None:
    """Words as somebody types them: `key=value`."""
    load({}, [word for word in data.decode("utf-8", "replace").split("\n") if word])


def read_owner(path: Path) -> None:
    """`panda.toml` is that of the working directory."""
    import os

    before = os.getcwd()
    os.chdir(path.parent)
    try:
        owner()
    finally:
        os.chdir(before)


def read_tokenizer(path: Path) -> None:
    """A directory with that tokenizer, and what is asked of it at once."""
    config = path.with_name("tokenizer_config.json")
    config.write_text('{"eos_token": "</s>"}')
    load_tokenizer(path.parent)


def read_tokenizer_config(path: Path) -> None:
    """The same the other way round."""
    path.with_name("tokenizer.json").write_bytes(TOKENIZER)
    load_tokenizer(path.parent)


def read_request(data: bytes, _: Path) -> None:
    """Both endpoints."""
    for kind in (ChatRequest, CompletionRequest):
        with suppress(ApiError):
            asked = parse_request(kind, data)
            asked.sampling(5)


READERS: dict[str, Reader] = {
    "json": Reader(read_json_file, RECORDS, ()),
    "record": Reader(read_record, RECORDS[1:], ()),
    "config": Reader(
        in_file("conf.yaml", lambda path: load({}, [], path)), (CONFIG, b"[]", b"model: panda-tiny\n"), slow=True
    ),
    "yaml": Reader(lambda data, _: parse_yaml(data.decode("utf-8", "replace")), (CONFIG,), (yaml.YAMLError,)),
    "overrides": Reader(
        read_overrides, (b"max_seq_length=64\narchitecture.hidden_size=32", b'template="a(b)"'), slow=True
    ),
    "run-config": Reader(in_file("config.yaml", read_config), (RUN_CONFIG,)),
    "manifest": Reader(
        in_file(MANIFEST, lambda path: open_manifest(path.parent)),
        (b'{"format_version": 1, "files": {}, "xxh3": "0"}',),
    ),
    "tombstones": Reader(in_file("tombstones.jsonl", tombstones.read), (TOMBSTONES,)),
    "owner": Reader(in_file(OWNER_FILE, read_owner), (b'allowed_targets = ["a.b"]\nallowed_roots = ["/srv"]\n',)),
    "tokenizer": Reader(in_file("tokenizer.json", read_tokenizer), (TOKENIZER,)),
    "tokenizer-config": Reader(
        in_file("tokenizer_config.json", read_tokenizer_config),
        (b'{"eos_token": "</s>", "bos_token": {"content": "</s>"}, "add_bos_token": true, "chat_template": "x"}',),
    ),
    "checkpoint": Reader(in_file("complete.json", lambda path: read_marker(path.parent)), (MARKER,)),
    "state": Reader(
        in_file("state-00000-00000.safetensors", lambda path: read_index(path.parent)),
        (
            (64).to_bytes(8, "little")
            + b'{"w|weight|0":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64)
            + bytes(8),
        ),
    ),
    "gate-job": Reader(in_file("gate-job.json", lambda path: read_job(path.parent)), (JOB,)),
    "tracking": Reader(in_file("tracking.json", lambda path: run_record.read(path.parent)), (RECORD,)),
    "request": Reader(read_request, (CHAT, b'{"model": "m", "prompt": [1, 2], "max_tokens": 2}'), ()),
    "event": Reader(
        lambda data, _: event_of(data.decode("utf-8", "replace")), (b'PANDA {"event": "step", "step": 1}',), ()
    ),
}
"""Name -> reader."""
