"""Finding eos, bos and stop tokens; training a tokenizer; errors that say what to do."""

import json
import shutil

import pytest

from data_prep.errors import TokenizerError
from data_prep.pipeline import prepare
from data_prep.records.shard import shard_records
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokenizer import load_tokenizer, train_tokenizer
from tests.support.tokenizers import SPECIALS, bytes_core, save


def test_what_training_must_know(bytes_tokenizer, llama_tokenizer):
    assert (bytes_tokenizer.eos_id, bytes_tokenizer.bos_ids, bytes_tokenizer.pad_id) == (1, (), 1)
    assert bytes_tokenizer.special_ids == {text: i for i, text in enumerate(SPECIALS)}
    assert llama_tokenizer.bos_ids == (llama_tokenizer.core.token_to_id("<s>"),)
    assert llama_tokenizer.eos_id == llama_tokenizer.core.token_to_id("</s>")


@pytest.mark.parametrize(
    ("name", "content", "stop_ids"),
    [
        ("tokenizer_config.json", {"eos_token": "</s>"}, [1]),
        ("tokenizer_config.json", {"eos_token": {"content": "<|im_end|>", "special": True}}, [3]),
        ("special_tokens_map.json", {"eos_token": "</s>"}, [1]),
        ("generation_config.json", {"eos_token_id": [3, 1]}, [3, 1]),
        ("config.json", {"eos_token_id": 1}, [1]),
    ],
)
def test_eos_is_found_where_hugging_face_writes_it(tmp_path, name, content, stop_ids):
    bytes_core().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_id == stop_ids[0]
    assert loaded.stop_ids == set(stop_ids)


def test_generation_may_stop_at_more_than_eos(tmp_path):
    save(bytes_core(), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    assert load_tokenizer(tmp_path).stop_ids == {1, 3}


def test_add_bos_token_is_obeyed(tmp_path, llama_dir):
    save(bytes_core(), tmp_path / "adds", bos_token="<s>", add_bos_token=True)
    assert load_tokenizer(tmp_path / "adds").bos_ids == (0,)
    shutil.copytree(llama_dir, tmp_path / "not")
    (tmp_path / "not" / "tokenizer_config.json").write_text('{"eos_token": "</s>", "add_bos_token": false}')
    assert load_tokenizer(tmp_path / "not").bos_ids == ()


def test_no_eos_is_an_error_that_says_where_it_looked(tmp_path):
    bytes_core().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"no eos token.*tokenizer_config.json.*generation_config.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"model": 1}'])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_an_empty_or_missing_directory_is_an_error(tmp_path):
    with pytest.raises(TokenizerError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="no such directory"):
        load_tokenizer(tmp_path / "absent")


def test_a_slow_tokenizer_is_converted_once(tmp_path):
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "a", "b", "ab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "</s>"})
    )
    loaded = load_tokenizer(tmp_path, tmp_path / "cache")
    assert loaded.core.encode("abb").ids == [4, 3]
    (converted,) = (tmp_path / "cache" / "tokenizers").iterdir()
    before = (converted / "tokenizer.json").stat().st_mtime_ns
    assert load_tokenizer(tmp_path, tmp_path / "cache").fingerprint == loaded.fingerprint
    assert (converted / "tokenizer.json").stat().st_mtime_ns == before


def test_the_fingerprint_changes_with_what_changes_ids(tmp_path, bytes_dir):
    fingerprints = {load_tokenizer(bytes_dir).fingerprint}
    for number, config in enumerate([{"eos_token": "<|im_end|>"}, {"add_bos_token": True, "bos_token": "<s>"}]):
        fingerprints.add(load_tokenizer(save(bytes_core(), tmp_path / str(number), **config)).fingerprint)
    assert len(fingerprints) == 3
    same = save(bytes_core(), tmp_path / "moved", model_max_length=77)
    assert load_tokenizer(same).fingerprint in fingerprints


def corpus_of(directory, records):
    (directory / "data").mkdir()
    (directory / "data" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return CorpusSettings(instruction_tuning_data_dir=str(directory / "data"), pretraining_data_dir=None)


def test_training_is_deterministic_and_usable(tmp_path):
    corpus = corpus_of(tmp_path, [{"input": f"say {i % 7} 你好", "target": f"number {i}"} for i in range(200)])
    records = shard_records(corpus, tmp_path / "cache")
    one, other = train_tokenizer(records, 300, tmp_path / "one"), train_tokenizer(records, 300, tmp_path / "other")
    assert (one / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    loaded = load_tokenizer(one)
    assert loaded.core.get_vocab_size() == 300
    assert loaded.core.decode(loaded.core.encode("say 你好 ∑").ids) == "say 你好 ∑"
    assert {"<s>", "</s>", "<pad>"} <= set(loaded.special_ids)


def test_without_a_tokenizer_one_is_trained(tmp_path):
    corpus = corpus_of(tmp_path, [{"input": f"{i}", "target": f"number {i}"} for i in range(100)])
    result = prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=64), None, tmp_path / "cache")
    assert result.report["accepted"] == 100
