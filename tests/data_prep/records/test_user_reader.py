"""The user's own reader: how it is called, what it may give, and what its records depend on.

Data sets are real ones, of torch and of datasets; one is the class of PandaLLM's guide, in its words.
"""

import json
from pathlib import Path

import pytest
from users_readers import (
    PAIRS,
    NoLength,
    Pairs,
    Stream,
    any_keyword,
    arrays,
    named_in_the_node,
    nothing,
    of_datasets,
    splits,
    tensors,
    tokenized,
    with_eos,
)

from data_prep.errors import CorpusError, PandaError
from data_prep.records.shard import ledger_table, shard_records
from data_prep.records.user_reader import read_records
from data_prep.settings import CorpusSettings
from data_prep.tokenizer import EOS, load_tokenizer, train_tokenizer


def node(function, **fields):
    return {"_target_": f"{function.__module__}.{function.__name__}", **fields}


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A file of pairs in a corpus directory, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "panda.toml").write_text('allowed_targets = ["users_readers"]')
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "pairs.json"
    path.write_text(json.dumps(PAIRS))
    return path


def corpus(**settings) -> CorpusSettings:
    return CorpusSettings(instruction_tuning_data_dir="in", pretraining_data_dir=None, **settings)


@pytest.mark.parametrize("function", [Pairs, Stream, of_datasets])
def test_a_data_set_gives_its_records(file, function):
    found = list(read_records(node(function), str(file), None))
    assert found == PAIRS


def test_the_class_of_the_guide(file):
    """Its records become ours; the documents it has from files of its own are trained whole."""
    (file.parents[1] / "files").mkdir()
    (file.parents[1] / "files" / "partition_1.json").write_text(json.dumps([f"document {i}" for i in range(5)]))
    reader = node(Pairs, pair_file_list="files/partition_*.json")
    found = list(read_records(reader, str(file), None))
    assert found[:2] == [PAIRS[0], {"text": "document 0"}]
    assert len(found) == 10
    result = shard_records(corpus(reader=reader), Path("cache"))
    assert (result.records, result.valid) == (10, 10)
    ledger = ledger_table(result.units[0])
    assert ledger["line"].to_pylist() == list(range(1, 11)) and set(ledger["offset"].to_pylist()) == {-1}


class TestTokenizer:
    def test_that_of_the_base_model(self, file):
        trained = train_tokenizer(shard_records(corpus(), Path("cache")), 300, Path("cache"))
        (answer,) = {one["target"].split(" ", 2)[2] for one in read_records(node(with_eos), str(file), trained)}
        assert answer == f"{EOS} {len(load_tokenizer(trained).core.encode('ab').ids)}"

    def test_a_model_from_scratch_gets_one_of_bytes(self, file):
        (answer,) = {one["target"].split(" ", 2)[2] for one in read_records(node(with_eos), str(file), None)}
        assert answer == f"{EOS} 2"

    def test_a_value_in_the_node_stays(self, file):
        found = list(read_records(node(named_in_the_node, tokenizer="mine"), str(file), None))
        assert found == [{"input": "mine", "target": "pairs.json"}]

    def test_a_function_that_takes_anything_is_called_as_the_guide_does(self, file):
        found = list(read_records(node(any_keyword, more=1), str(file), None))
        assert found == [{"input": "pairs.json", "target": EOS, "more": 1}]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (tensors, r"tensors on .*pairs.json, record 1: it is a tuple; a record is a dict such as"),
        (tokenized, r"record 1: it holds ids of tokens \(input_ids\); give the text instead"),
        (arrays, r"record 2: it is a numpy.ndarray"),
        (nothing, "gives a NoneType; it must return a data set or an iterable of records"),
        (splits, "gives a DatasetDict: choose one of its splits"),
        (NoLength, "without a length; define __len__ or __iter__"),
    ],
)
def test_what_is_no_record_is_refused(file, function, message):
    with pytest.raises(CorpusError, match=message):
        shard_records(corpus(reader=node(function)), Path("cache"))


def test_a_constant_is_no_reader(file):
    with pytest.raises(PandaError, match=r"reader: .*PAIRS is not what its name says"):
        shard_records(corpus(reader={"_target_": "users_readers.PAIRS"}), Path("cache"))


def test_a_package_that_cannot_be_imported_says_why(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parents[1])
    Path("dated").mkdir()
    Path("dated/__init__.py").write_text("from json import no_such_name\n")
    Path("dated/sets.py").write_text("")
    with pytest.raises(PandaError, match=r"no module dated.sets \(cannot import name 'no_such_name'"):
        shard_records(corpus(reader={"_target_": "dated.sets.Pairs"}), Path("cache"))


class TestMadeAgain:
    """What was read stays until something changes that it was read from."""

    def built(self, reader, tokenizer=None) -> int:
        return shard_records(corpus(reader=reader), Path("cache"), tokenizer_dir=tokenizer).built

    @pytest.mark.parametrize("where", ["files/*.json", "files/a.json", "files/", "./files/**/*.json"])
    def test_when_a_file_changes_that_a_field_names(self, file, where):
        Path("files").mkdir()
        Path("files/a.json").write_text("[]")
        reader = node(Stream, files=[where])
        assert [self.built(reader), self.built(reader)] == [1, 0]
        Path("files/a.json").write_text("[1]")
        assert self.built(reader) == 1

    def test_when_the_tokenizer_is_another(self, file):
        trained = train_tokenizer(shard_records(corpus(), Path("cache")), 300, Path("cache"))
        assert [self.built(node(with_eos), one) for one in (None, trained, trained)] == [1, 1, 0]

    def test_not_for_texts_that_name_no_file(self, file):
        fields = {"separator": "*", "folder": ".", "name": "in", "number": 3}
        reader = node(Stream, **fields)
        self.built(reader)
        (file.parents[1] / "new.txt").write_text("beside the corpus")
        assert self.built(reader) == 0
