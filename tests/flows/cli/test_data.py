"""`panda prepare | inspect | why | verify` as a user types them, on a small corpus and on the real one where it is."""

import json
from pathlib import Path

import pytest

from flows.cli.main import main
from tests.support.real_corpora import REAL


@pytest.fixture
def flags(tmp_path, bytes_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    records = [{"input": f"question {i}", "target": f"answer {i}"} for i in range(50)] + [{"input": "no target"}]
    (tmp_path / "data" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["--instruction_tuning_data_dir", "data", "--pretraining_data_dir", "null", "--ckpt_path", str(bytes_dir),
            "--max_seq_length", "128"]  # fmt: skip


def run(capsys, *argv):
    code = main(list(argv))
    return code, capsys.readouterr()


def last_line(captured):
    return json.loads(captured.out.strip().splitlines()[-1])


def test_prepare_prints_the_report(flags, capsys):
    code, captured = run(capsys, "prepare", *flags, "--json", "--output_dir", "out")
    report = last_line(captured)
    assert code == 0
    assert (report["records_in"], report["accepted"], report["rejected"]) == (51, 50, {"missing_field": 1})
    assert json.loads(Path("out/prepare.json").read_text())["rows"] == report["rows"]
    code, captured = run(capsys, "prepare", *flags, "seed=7")
    assert code == 0
    assert "rejected: missing_field" in captured.out


def test_inspect_why_verify(flags, capsys):
    code, captured = run(capsys, "inspect", *flags, "--html", "page.html", "--markdown", "page.md")
    assert code == 0
    assert "answer" in captured.out
    assert Path("page.html").read_text().startswith("<!doctype html>")
    assert "⟦answer" in Path("page.md").read_text()
    code, captured = run(capsys, "why", "a.jsonl:3", *flags, "--json")
    (story,) = last_line(captured)["stories"]
    assert (code, story["texts"]) == (0, [["user", "question 2"], ["assistant", "answer 2"]])
    code, captured = run(capsys, "why", "--text", "question 4", *flags)
    assert (code, captured.out.count("accepted")) == (0, 11)
    code, captured = run(capsys, "why", *flags)
    assert (code, "give FILE:LINE first" in captured.err) == (2, True)
    assert run(capsys, "verify")[0] == 0
    victim = next(Path("cache/records").rglob("records.arrow"))
    victim.write_bytes(victim.read_bytes()[:-1])
    code, captured = run(capsys, "verify", "--discard", "--json")
    assert code == 3
    assert list(last_line(captured)["damaged"].values()) == [["records.arrow"]]
    assert run(capsys, "prepare", *flags)[0] == 0
    assert run(capsys, "verify")[0] == 0


def test_errors_are_one_message(flags, capsys):
    code, captured = run(capsys, "prepare", *flags, "--mixture", "{medical: 2}")
    assert code == 2
    assert captured.err.strip().splitlines()[-1].startswith("error: mixture: medical: 2.0: not a source")


@pytest.mark.skipif(not REAL.is_dir(), reason="no real corpora; set PANDA_REAL_CORPORA")
def test_the_real_corpora(capsys, tmp_path, smollm2_dir):
    argv = [
        "prepare", "--instruction_tuning_data_dir", str((REAL / "instruction_tuning").resolve()),
        "--pretraining_data_dir", str((REAL / "pretraining").resolve()), "--ckpt_path", str(smollm2_dir),
        "--max_seq_length", "2048", "--output_dir", str(tmp_path / "out"), "--cache_dir",
        str(tmp_path / "cache"), "--json",
    ]  # fmt: skip
    code, captured = run(capsys, *argv)
    report = last_line(captured)
    assert code == 0
    assert report["records_in"] == 2390 == report["accepted"] + sum(report["dropped"].values())
    assert report["engines"] == {"fastokens": 4}
    assert report["utilisation"] > 0.99
    assert set(report["sources"]) == {"instruction", "pretraining"}
    report = last_line(run(capsys, *argv)[1])
    assert report["reused"] == {"records": True, "tokenize": True, "plan": True}
