"""The store: complete or not there, reused by content, damage named and rebuilt, two builders at once, kill -9."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_prep import store
from data_prep.errors import StoreError


def write_hello(directory: Path) -> dict:
    (directory / "a.txt").write_text("hello")
    (directory / "b.txt").write_text("world")
    return {"rows": 2}


def test_a_directory_is_built_once_and_then_reused(tmp_path):
    first = store.build(tmp_path, "f00", write_hello)
    second = store.build(tmp_path, "f00", lambda directory: pytest.fail("made again"))
    assert (first.reused, second.reused) == (False, True)
    assert first.manifest == second.manifest
    assert first.manifest["rows"] == 2
    assert first.manifest["files"]["a.txt"]["bytes"] == 5
    assert sorted(path.name for path in first.path.iterdir()) == ["a.txt", "b.txt", "manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["f00"]


def test_the_fingerprint_is_of_values_not_of_their_order():
    assert store.fingerprint(a=1, b=[2]) == store.fingerprint(b=[2], a=1)
    assert store.fingerprint(a=1) != store.fingerprint(a=2)
    assert store.fingerprint(a=1) != store.fingerprint(a=1, b=None)
    assert len(store.fingerprint()) == 32


def test_a_failed_make_leaves_nothing(tmp_path):
    def fail(directory: Path) -> dict:
        (directory / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.build(tmp_path, "f00", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_byte_is_named_and_rebuilt(tmp_path, caplog):
    path = store.build(tmp_path, "f00", write_hello).path
    (path / "b.txt").write_text("worl")
    with pytest.raises(StoreError, match=r"b\.txt: 4 bytes instead of 5"):
        store.open_manifest(path)
    again = store.build(tmp_path, "f00", write_hello)
    assert not again.reused
    assert "b.txt" in caplog.text
    assert store.verify(path) == []


def test_a_flipped_byte_is_found_by_verify(tmp_path):
    path = store.build(tmp_path, "f00", write_hello).path
    assert store.verify(path) == []
    (path / "b.txt").write_text("wOrld")
    assert store.verify(path) == ["b.txt"]
    store.discard(path)
    assert not store.build(tmp_path, "f00", write_hello).reused
    assert store.verify(path) == []


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format_version": 99}', None])
def test_a_damaged_manifest_is_named_and_rebuilt(tmp_path, damage):
    path = store.build(tmp_path, "f00", write_hello).path
    manifest = path / "manifest.json"
    if damage is None:
        manifest.unlink()
    else:
        manifest.write_bytes(damage)
    with pytest.raises(StoreError, match="f00"):
        store.open_manifest(path)
    assert store.verify(path) == ["manifest.json"]
    assert not store.build(tmp_path, "f00", write_hello).reused
    assert store.build(tmp_path, "f00", write_hello).reused


@pytest.mark.parametrize("change", [{"rows": 3}, {"files": {"b.txt": {"bytes": 5, "xxh3": "0" * 32}}}])
def test_a_changed_value_in_the_manifest_is_found_and_no_file_is_blamed(tmp_path, change):
    path = store.build(tmp_path, "f00", write_hello).path
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    assert store.verify(path) == ["manifest.json"]


def test_two_builders_at_once_give_one_directory(tmp_path):
    both = threading.Barrier(2)
    results = []

    def make(directory: Path) -> dict:
        both.wait(10)
        return write_hello(directory)

    threads = [threading.Thread(target=lambda: results.append(store.build(tmp_path, "f00", make))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.reused for result in results) == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["f00"]


def test_what_a_killed_builder_left_is_removed_and_a_living_one_is_not_touched(tmp_path):
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from data_prep import store

        def make(directory):
            (directory / "half").write_text("x")
            print("writing", flush=True)
            time.sleep(60)

        store.build(Path(sys.argv[1]), sys.argv[2], make)
    """)

    def start(name):
        return subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), name],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": "."},
        )

    killed, living = start("dead"), start("alive")
    try:
        for process in (killed, living):
            assert process.stdout.readline() == b"writing\n"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        store.build(tmp_path, "f00", write_hello)
        names = sorted(
            path.name.split("-")[1] if path.name.startswith(".") else path.name for path in tmp_path.iterdir()
        )
        assert names == ["alive", "f00"]
    finally:
        for process in (killed, living):
            process.kill()
            process.wait()


def test_what_another_host_builds_is_left_alone_for_a_day(tmp_path):
    """On a network file system its lock is not seen here."""
    theirs = tmp_path / f"{store.BUILDING}f00-another-host-0a1b2c3d"
    theirs.mkdir()
    store.build(tmp_path, "f01", write_hello)
    assert theirs.exists()
    os.utime(theirs, (0, 0))
    store.build(tmp_path, "f02", write_hello)
    assert not theirs.exists()


def test_a_file_is_written_whole_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    store.write_atomically(tmp_path / "a.json", '{"panda": "熊猫"}')
    monkeypatch.setattr(Path, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        store.write_atomically(tmp_path / "a.json", "another")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"panda": "熊猫"}


def test_writers_at_once_leave_the_text_of_one_of_them(tmp_path):
    texts = [str(number) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=store.write_atomically, args=(tmp_path / "a.txt", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.txt").read_text() in texts


class TestAppend:
    def test_lines_are_added_and_half_a_line_before_them_goes(self, tmp_path):
        path = tmp_path / "lines.jsonl"
        store.append(path, "1\n2\n", mode=0o600)
        assert path.stat().st_mode & 0o777 == 0o600
        with path.open("a") as file:
            file.write("3, cut o")
        store.append(path, "4\n")
        assert path.read_text() == "1\n2\n4\n"
        path.write_text("no line at all")
        store.append(path, "1\n")
        assert path.read_text() == "1\n"

    def test_a_disk_that_fills_takes_no_half_line(self, tmp_path):
        path = tmp_path / "lines.jsonl"
        store.append(path, "a" * 90 + "\n")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            for _ in range(2):
                with pytest.raises(OSError, match=r"lines\.jsonl|too large"):
                    store.append(path, "b" * 20 + "\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_text() == "a" * 90 + "\n"

    def test_many_at_once_add_whole_lines(self, tmp_path):
        path = tmp_path / "lines.jsonl"
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda number: store.append(path, f"{number:05}" * 500 + "\n"), range(200)))
        lines = path.read_text().splitlines()
        assert sorted(line[:5] for line in lines) == [f"{number:05}" for number in range(200)]
        assert all(line == line[:5] * 500 for line in lines)
