"""A corpus on a real S3 server (moto's, on loopback): the same plan as on the disk, etags, `panda why`, no secrets.

Wants `s3fs` and `moto[server]`, which `make test-extra` installs.
"""

from pathlib import Path

import pytest

from data_prep.errors import CorpusError
from data_prep.inspection.record_story import stories_at
from data_prep.pipeline import prepare
from data_prep.places import download
from data_prep.places.address import list_files
from data_prep.places.download import RemoteFile
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokenizer import load_tokenizer
from tests.support import tables
from tests.support.tokenizers import bytes_core, save

pytestmark = pytest.mark.extra
NUMBER = 50_000
SECRET = "hunter2hunter2"


@pytest.fixture(scope="module")
def bucket():
    """A client of a server with a bucket of the name corpora; s3fs finds both in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpora")
        yield client
    server.stop()


def prepared(place: str, tokenizer: Path, cache: Path):
    corpus = CorpusSettings(instruction_tuning_data_dir=place, pretraining_data_dir=None)
    return prepare(corpus, TokenizeSettings(), PackSettings(max_seq_length=512), tokenizer, cache)


def test_the_same_plan_from_files_of_every_form_and_from_s3(bucket, tmp_path):
    tokenizer = save(bytes_core(), tmp_path / "tokenizer", bos_token="<s>")
    rows = tables.records(NUMBER)
    plans = {}
    for form in ("jsonl", "parquet", "csv"):
        folder = tables.write(tmp_path / form, form, rows)
        bucket.upload_file(str(folder / f"a.{form}"), "corpora", f"{form}/a.{form}")
        plans[form] = prepared(str(folder), tokenizer, tmp_path / "cache")
        plans[f"s3 {form}"] = prepared(f"s3://corpora/{form}", tokenizer, tmp_path / f"cache-{form}")
    wanted = tables.rows_of(plans["jsonl"].path)
    for name, plan in plans.items():
        assert plan.report["records_in"] == plan.report["accepted"] == NUMBER
        assert all((a == b).all() for a, b in zip(tables.rows_of(plan.path), wanted, strict=True)), name
    (story,) = stories_at(Path(plans["s3 jsonl"].path), "s3://corpora/jsonl/a.jsonl:12", load_tokenizer(tokenizer))
    assert story.texts[0][1] == rows[11]["instruction"]
    assert story.place == "s3://corpora/jsonl/a.jsonl:12"
    for cache in ("cache-jsonl", "cache-csv", "cache-parquet"):
        assert not [
            path for path in (tmp_path / cache).rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()
        ]
        assert [path.name for path in (tmp_path / cache / "remote").glob("*/*")] == ["pieces.json"]


def test_an_object_that_is_replaced_is_named_with_both_etags(bucket, tmp_path, monkeypatch):
    bucket.put_object(Bucket="corpora", Key="b/b.jsonl", Body=b"x" * 3000)
    (file,) = list_files("s3://corpora/b")
    read = download.read_range

    def replaced(address: str, start: int, stop: int) -> bytes:
        data = read(address, start, stop)
        if start == 1000:
            bucket.put_object(Bucket="corpora", Key="b/b.jsonl", Body=b"y" * 3000)
        return data

    monkeypatch.setattr(download, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(download, "read_range", replaced)
    remote = RemoteFile(file.address, file.version, file.size, str(tmp_path))
    with pytest.raises(CorpusError, match=rf"s3://corpora/b/b\.jsonl was replaced .*it was {file.version}, now it is"):
        remote.fetch()
    (now,) = list_files("s3://corpora/b")
    again = RemoteFile(now.address, now.version, now.size, str(tmp_path))
    assert again.fetch().read_bytes() == b"y" * 3000  # nothing of the old one is in it


def test_a_bucket_that_is_not_there(bucket, tmp_path):
    with pytest.raises(CorpusError, match="s3://nowhere/x") as caught:
        list_files("s3://nowhere/x")
    assert SECRET not in str(caught.value)
