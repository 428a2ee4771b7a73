"""The user's own reader of one file: a function, or the class of a data set, named by the setting `reader`.

In: the node, the path of a file, the directory of the tokenizer. Out: the records it gives. It is called with

    file_path   the file, for each file of the corpus directories; without a parameter of that name, as first argument
    tokenizer   where it has a parameter of that name and the node gives it no value: that of the base model, from
                transformers. A model from scratch has none yet: it gets one with its special tokens that knows bytes
    ...         the other fields of the node

which is how PandaLLM's guide calls its `read_tensor`. It gives an iterable (a generator, a list, an `IterableDataset`)
or a data set with a length and an index (torch, datasets). What these may hold:

    a record                    any shape of `normalise`; a wrong one is rejected, with a line of the ledger
    {"inputs", "targets"}       PandaLLM's words for {"input", "target"}; with empty inputs, for {"text"}
    {"flan": a, "extra": b}     PandaLLM's pair of records: two records; "extra" may be absent

Anything else (tensors, tuples, ids of tokens) ends the preparation with an error: tokens, masks and rows are made here.
Cost: the user's; transformers is imported (2 s a process) only where a reader takes a tokenizer.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep import store
from data_prep.errors import CorpusError, PandaError
from data_prep.targets import in_time, load_target, target_fingerprint
from data_prep.tokenizer import load_tokenizer, write_untrained

FILE_PATH, TOKENIZER = "file_path", "tokenizer"
ANY_KEYWORD = inspect.Parameter.VAR_KEYWORD
JSON_TYPES = (dict, list, str, int, float, bool, type(None))
PAIR = {"flan", "extra"}
SHAPES = (
    "a record is a dict such as {input, target}, {instruction, input, output}, {title, content}, {text}, or a list of "
    "turns; tokenizing, masking and packing are done here"
)


def read_records(reader: dict[str, Any], path: str, tokenizer_dir: Path | None) -> Iterator[Any]:
    """The records of one file.

    :raises CorpusError: the reader fails, takes too long for a record, or gives what is no record.
    """
    name, count = reader["_target_"], 0
    try:
        for item in _each(reader, path, tokenizer_dir):
            for record in _records(item):
                _refuse_other(record, f"reader {name} on {path}, record {count + 1}")
                yield record
                count += 1
    except PandaError:
        raise
    except Exception as error:
        where = f"reader {name} failed on {path} after {count} records"
        raise CorpusError(f"{where}: {type(error).__name__}: {error}") from error


def _each(reader: dict[str, Any], path: str, tokenizer_dir: Path | None) -> Iterator[Any]:
    """What the reader gives, one after another, each in time."""
    with in_time():
        items = iter(_items(_called(reader, path, tokenizer_dir), reader["_target_"]))
    end = object()
    while True:
        with in_time():
            item = next(items, end)
        if item is end:
            return
        yield item


def reader_fingerprint(reader: dict[str, Any], tokenizer_dir: Path | None, cache_dir: Path | None) -> dict[str, Any]:
    """What its records depend on beside the file: the node, its module, the files that fields name, the tokenizer.

    A field names files where its text is the path of one, a directory (with a slash in it), or a pattern that matches.
    """
    parts = target_fingerprint(reader, "reader")
    files = sorted(set(chain.from_iterable(map(_files, _texts(reader)))))
    if files:
        parts["files"] = [[path, store.hash_file(path)] for path in files]
    if TOKENIZER in _keywords(_without_values(reader), reader):
        parts["tokenizer"] = load_tokenizer(tokenizer_dir, cache_dir).fingerprint if tokenizer_dir else None
    return parts


def _without_values(reader: dict[str, Any]) -> Callable:
    """The function to look at: its nested nodes are not called for that."""
    try:
        return load_target({**dict.fromkeys(reader), "_target_": reader["_target_"]}, "reader")
    except PandaError:
        raise
    except Exception as error:
        raise CorpusError(f"reader {reader['_target_']} cannot be loaded: {type(error).__name__}: {error}") from error


def _called(reader: dict[str, Any], path: str, tokenizer_dir: Path | None) -> Any:
    function = load_target(reader, "reader")
    wanted = _keywords(function, reader)
    given = {FILE_PATH: path} if FILE_PATH in wanted else {}
    if TOKENIZER in wanted:
        given[TOKENIZER] = _tokenizer(tokenizer_dir)
    return function(**given) if FILE_PATH in wanted else function(path, **given)


def _keywords(function: Callable, reader: dict[str, Any]) -> set[str]:
    """Which of the two a reader takes by name. A value that the node itself has for `tokenizer` stays."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # none is known of some functions written in C; or a field fits none, which the call will say
        return set()
    named = {parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.POSITIONAL_ONLY}
    kinds = {parameter.kind for parameter in parameters}
    if ANY_KEYWORD in kinds and kinds <= {ANY_KEYWORD, inspect.Parameter.KEYWORD_ONLY}:
        named |= {FILE_PATH, TOKENIZER}
    return named & {FILE_PATH, TOKENIZER} - ({TOKENIZER} if reader.get(TOKENIZER) is not None else set())


def _tokenizer(directory: Path | None) -> Any:
    """As transformers loads it."""
    from tempfile import TemporaryDirectory

    from transformers import AutoTokenizer

    if directory is not None:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    with TemporaryDirectory() as folder:
        write_untrained(Path(folder))
        return AutoTokenizer.from_pretrained(folder)


def _items(made: Any, name: str) -> Iterable[Any]:
    """What was made, as something to go through."""
    if isinstance(made, (str, bytes, dict)) or not (hasattr(made, "__iter__") or hasattr(made, "__getitem__")):
        kind = "a DatasetDict: choose one of its splits" if type(made).__name__ == "DatasetDict" else _kind(made)
        raise CorpusError(f"reader {name} gives {kind}; it must return a data set or an iterable of records: {SHAPES}")
    if hasattr(made, "__iter__"):
        return made
    if not hasattr(made, "__len__"):
        raise CorpusError(f"reader {name} gives {_kind(made)} without a length; define __len__ or __iter__")
    return (made[index] for index in range(len(made)))  # an index past the end need not raise IndexError


def _records(item: Any) -> Iterator[Any]:
    """The record, or the pair of records, in PandaLLM's words or ours."""
    if isinstance(item, dict) and "flan" in item and item.keys() <= PAIR:
        for record in item.values():
            yield from _records(record)
    elif isinstance(item, dict) and {"inputs", "targets"} <= item.keys():
        asked, answer = item["inputs"], item["targets"]
        is_document = isinstance(asked, str) and not asked.strip()
        yield {"text": answer} if is_document else {"input": asked, "target": answer}
    else:
        yield item


def _refuse_other(record: Any, where: str) -> None:
    if isinstance(record, dict) and "input_ids" in record:
        raise CorpusError(f"{where}: it holds ids of tokens (input_ids); give the text instead: {SHAPES}")
    if not isinstance(record, JSON_TYPES):
        raise CorpusError(f"{where}: it is {_kind(record)}; {SHAPES}")


def _kind(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("a builtins.", "a ")


def _texts(value: Any) -> Iterator[str]:
    """All texts in a node but the names of functions."""
    if isinstance(value, dict):
        yield from chain.from_iterable(_texts(inner) for key, inner in value.items() if key != "_target_")
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_texts, value))
    elif isinstance(value, str) and any(map(str.isalnum, value)):
        yield value


def _files(text: str) -> Iterator[str]:
    """The files a text names."""
    found = [text] if os.path.exists(text) else glob(text, recursive=True)
    for path in found:
        if os.path.isfile(path):
            yield path
        elif os.sep in text:
            yield from (os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names)
