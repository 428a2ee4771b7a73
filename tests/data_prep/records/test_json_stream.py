"""The readers: every form, exact places, recovery from damage, and nothing lost whatever the bytes are."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_prep.records import json_stream, source
from data_prep.records.json_stream import find_form, find_opening, read_blocks
from data_prep.records.reasons import Reason
from data_prep.records.source import Piece, Source

QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
A, B, C = {"input": "a", "target": "b"}, {"input": "c", "target": "d"}, {"input": "e", "target": "f"}
SMALL_WINDOWS = [
    (source, "WINDOW_BYTES", 96),
    (source, "READ_BYTES", 96),
    (source, "GZIP_CHUNK_BYTES", 7),
    (source, "ZSTD_CHUNK_BYTES", 7),
    (json_stream, "MIN_WINDOW_BYTES", 24),
    (json_stream, "PATIENCE_BYTES", 48),
]


def read_all(path: Path) -> list[tuple]:
    """(record bytes, offset, line, reason) of every record."""
    result = []
    for block in read_blocks(Source(Piece(str(path)))):
        assert len(block.records) == len(block.offsets) == len(block.lengths) == len(block.lines)
        places = zip(block.records, block.offsets.tolist(), block.lengths.tolist(), block.lines.tolist(), strict=True)
        for index, (record, offset, length, line) in enumerate(places):
            assert len(bytes(record)) == length
            result.append((bytes(record), offset, line, block.faults.get(index)))
    return result


def read_text(tmp_path: Path, text: str | bytes, name: str = "a.json") -> list[tuple]:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_all(path)


def values(records: list[tuple]) -> list:
    return [json.loads(record) if reason is None else reason for record, _, _, reason in records]


def test_places_of_an_array(tmp_path):
    text = '[\n  {"text": "a"},\n\n  {"text": "bb"}  ,{"text": "ä"}\n]\n'
    assert read_text(tmp_path, text) == [
        (b'{"text": "a"}', 4, 2, None),
        (b'{"text": "bb"}', 22, 4, None),
        ('{"text": "ä"}'.encode(), 39, 4, None),
    ]


def test_places_of_lines(tmp_path):
    text = '{"text": "a"}\r\n\r\n  {"text": "bb"}\n   \n{"text": "c"}'
    assert read_text(tmp_path, text) == [
        (b'{"text": "a"}\r', 0, 1, None),
        (b'  {"text": "bb"}', 17, 3, None),
        (b'{"text": "c"}', 38, 5, None),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t ", []),
        ("[]", []),
        ("[ ]\n", []),
        (json.dumps([A]), [A]),
        (json.dumps([A, B]), [A, B]),
        (json.dumps([A, B], indent=2), [A, B]),
        (json.dumps([[A, B], [C]]), [[A, B], [C]]),
        (json.dumps([[A, B], [C]], indent=1), [[A, B], [C]]),
        (json.dumps(A), [A]),
        (json.dumps(A, indent=4), [A]),
        (json.dumps(A, indent=4) + "\n" + json.dumps(B, indent=4), [A, B]),
        (json.dumps(A, indent=4) + ",\n" + json.dumps(B, indent=4), [A, B]),
        (json.dumps(A) + "\n" + json.dumps(B), [A, B]),
        (json.dumps(A) + "\n\n" + json.dumps(B) + "\n", [A, B]),
        (json.dumps([A, B]) + "\n" + json.dumps([C]) + "\n", [[A, B], [C]]),
        (json.dumps([A, B]) + "\n\n", [A, B]),
        (json.dumps([A]) + json.dumps([B]), [A, B]),
        ("\ufeff" + json.dumps([A, B]), [A, B]),
        ("\ufeff" + json.dumps(A) + "\n" + json.dumps(B), [A, B]),
        ("[" + json.dumps(A) + "," + json.dumps(B) + ",]", [A, B]),
        ('["a", 5, null, {"text": "x"}]', ["a", 5, None, {"text": "x"}]),
    ],
)
@pytest.mark.parametrize("small", [False, True])
def test_forms_are_found_by_content(tmp_path, monkeypatch, text, expected, small):
    for module, name, value in SMALL_WINDOWS if small else ():
        monkeypatch.setattr(module, name, value)
    assert values(read_text(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('{"a": 1', "lines"),
        ('{"a": 1\n{"a": 2}\n', "lines"),
        ('{"a":\n 1}', "values"),
        ("[\n{}", "array"),
        ('[{"a": 1}, {', "array"),
        ("hello\nworld", "lines"),
    ],
)
def test_find_form(text, form):
    assert find_form(text.encode()) == form


def test_find_opening():
    assert find_opening(json.dumps([A, B], indent=2).encode()) == b',\n  {\n    "input"'
    assert find_opening(json.dumps([[A], [B]]).encode()) == b', [{"input"'
    assert find_opening(b"[1, 2]") == b""
    assert find_opening(b'[{"a": 1') == b""


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"input": "x", "target": "y"', Reason.MALFORMED_JSON),  # brace missing
        ('{"input": "x, "target": "y"}', Reason.MALFORMED_JSON),  # quote missing
        ('{"input": x", "target": "y"}', Reason.MALFORMED_JSON),
        ('{"input": "x" "target": "y"}', Reason.MALFORMED_JSON),
        ('{"input": "x", "target": NaN}', None),  # balanced: found broken when it is decoded
        ('{"input": "x", "target": "\\ud800"}', None),
        ('{"input": ["x", "target": "y"}', Reason.MALFORMED_JSON),  # bracket missing
        ("nonsense", None),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("sizes", [[], SMALL_WINDOWS], ids=["", "small"])
def test_a_broken_element_costs_itself_alone(tmp_path, broken, reason, indent, sizes):
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in sizes:
            patch.setattr(module, name, value)
        check_broken_element(tmp_path, broken, reason, indent)


def check_broken_element(tmp_path, broken, reason, indent):
    good = [{"input": f"in {number}", "target": "out"} for number in range(40)]
    good[7]["input"] = '},{ "input": "x" }, ['
    texts = [json.dumps(record, indent=indent) for record in good]
    texts.insert(20, broken)
    records = read_text(tmp_path, "[" + ",\n".join(texts) + "\n]")
    assert [record.decode() for record, *_ in records] == texts
    assert [fault for *_, fault in records] == [reason if number == 20 else None for number in range(41)]


@pytest.mark.parametrize("position", [0, 2])
def test_a_broken_first_or_last_element(tmp_path, position):
    texts = [json.dumps(A), json.dumps(B)]
    texts.insert(position, '{"input": "x, "target": "y"}')
    records = read_text(tmp_path, "[" + ",\n".join(texts) + "\n]")
    assert [record.decode() for record, *_ in records] == texts
    assert [fault for *_, fault in records].count(Reason.MALFORMED_JSON) == 1


@pytest.mark.parametrize("cut", [1, 5, 16, 28, 30])
def test_a_truncated_array_keeps_what_came_before(tmp_path, cut):
    text = "[" + json.dumps(A) + ", " + json.dumps(B) + "]"
    records = read_text(tmp_path, text[:-cut])
    assert values(records) == ([A, B] if cut == 1 else [A]) + [Reason.TRUNCATED_FILE]
    assert b"".join(record for record, _, _, reason in records if reason) == (
        b"" if cut in (1, 30) else text[32:-cut].encode()
    )


def test_a_truncated_last_line(tmp_path):
    lines = json.dumps(A) + "\n" + json.dumps(B)
    assert values(read_text(tmp_path, lines[:-3])) == [A, Reason.TRUNCATED_FILE]
    broken = read_text(tmp_path, lines + "x")  # complete but wrong: left to the decoder
    assert [reason for *_, reason in broken] == [None, None]


def compressed(data: bytes, suffix: str) -> bytes:
    return gzip.compress(data) if suffix == "gz" else zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("form", ["array", "lines"])
def test_compressed_files(tmp_path, suffix, form):
    records = [{"input": f"{number}" * 50, "target": "out"} for number in range(5000)]
    text = json.dumps(records, indent=1) if form == "array" else "".join(json.dumps(row) + "\n" for row in records)
    half = len(text) // 2
    data = compressed(text[:half].encode(), suffix) + compressed(text[half:].encode(), suffix)  # two streams
    plain = read_text(tmp_path, text)
    assert read_text(tmp_path, data, f"a.json.{suffix}") == plain
    assert values(plain) == records


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("form", ["array", "lines"])
def test_a_truncated_compressed_file_keeps_what_came_before(tmp_path, suffix, form):
    records = [{"input": str(hash(str(number))), "target": "out"} for number in range(30000)]
    text = json.dumps(records) if form == "array" else "".join(json.dumps(record) + "\n" for record in records)
    data = compressed(text.encode(), suffix)
    got = values(read_text(tmp_path, data[: len(data) * 2 // 3], f"a.json.{suffix}"))
    assert got[:-1] == records[: len(got) - 1]
    assert len(got) > 1000
    assert got[-1] == Reason.TRUNCATED_FILE


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_that_is_not_compressed_although_its_name_says_so(tmp_path, suffix):
    assert values(read_text(tmp_path, json.dumps([A]), f"a.json.{suffix}")) == [Reason.TRUNCATED_FILE]


def test_a_record_beyond_the_limit_is_rejected_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "MAX_RECORD_BYTES", 10_000)
    monkeypatch.setattr(source, "WINDOW_BYTES", 1_000)
    monkeypatch.setattr(source, "READ_BYTES", 1_000)
    monkeypatch.setattr(json_stream, "HEAD_BYTES", 1_000)
    long = {"text": "x" * 30_000}
    lines = values_or_none(read_text(tmp_path, "".join(json.dumps(row) + "\n" for row in (A, long, B))))
    assert lines[0] == A and lines[-1] == B and Reason.OVERSIZED_RECORD in lines
    array = values_or_none(read_text(tmp_path, json.dumps([A, long, B])))
    assert array[0] == A and array[-1] == B and Reason.OVERSIZED_RECORD in array


@pytest.mark.parametrize("length", [10_001, 12_000, 19_999])
def test_the_limit_holds_also_where_the_end_of_the_record_is_seen(tmp_path, monkeypatch, length):
    monkeypatch.setattr(json_stream, "MAX_RECORD_BYTES", 10_000)
    for window in (1_000, 4_000):
        monkeypatch.setattr(source, "WINDOW_BYTES", window)
        monkeypatch.setattr(source, "READ_BYTES", window)
        monkeypatch.setattr(json_stream, "HEAD_BYTES", window)
        long = {"text": "x" * (length - len('{"text": ""}'))}
        texts = ["".join(json.dumps(row) + "\n" for row in (A, long, B)), json.dumps([A, long, B])]
        for text in texts:
            got = values_or_none(read_text(tmp_path, text))
            assert got[0] == A and got[-1] == B and long not in got and Reason.OVERSIZED_RECORD in got


def test_blank_lines_of_any_length_are_blank(tmp_path):
    assert values(read_text(tmp_path, f"{json.dumps(A)}\n{' ' * 64}\n{' ' * 5000}\n\t\n{json.dumps(B)}\n")) == [A, B]


def values_or_none(records: list[tuple]) -> list:
    return [reason or (json.loads(record) if is_json(record) else None) for record, _, _, reason in records]


def is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return False
    return True


texts = st.text(alphabet='ab"\\{}[],:\n\t é竹', max_size=12)
records = st.one_of(
    st.fixed_dictionaries({"input": texts, "target": texts}),
    st.fixed_dictionaries({"text": texts}, optional={"extra": st.lists(st.dictionaries(texts, texts, max_size=2))}),
    st.fixed_dictionaries(
        {"conversations": st.lists(st.fixed_dictionaries({"from": texts, "value": texts}), max_size=3)}
    ),
    st.lists(st.fixed_dictionaries({"input": texts, "target": texts}), max_size=2),
)
STYLES = {
    "compact": lambda rows: json.dumps(rows, separators=(",", ":")),
    "spaced": lambda rows: json.dumps(rows, ensure_ascii=False),
    "indented": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False),
    "a line each": lambda rows: "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]",
    "uneven": lambda rows: "[" + ",".join(" " * (i % 3) + json.dumps(row) for i, row in enumerate(rows)) + " ]",
    "lines": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "crlf": lambda rows: "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
}


@QUICK
@given(rows=st.lists(records, max_size=12), style=st.sampled_from(sorted(STYLES)), small=st.booleans())
def test_what_was_written_is_read(tmp_path, rows, style, small):
    if style in ("lines", "crlf") and len(rows) < 2:
        return  # one line alone is read as an array if it is a list
    text = STYLES[style](rows)
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in SMALL_WINDOWS if small else ():
            patch.setattr(module, name, value)
        got = read_text(tmp_path, text)
    assert values(got) == rows
    for record, offset, line, _ in got:
        assert text.encode()[offset : offset + len(record)] == record
        assert line == text.encode()[:offset].count(b"\n") + 1


@st.composite
def damaged(draw):
    data = bytearray(STYLES[draw(st.sampled_from(sorted(STYLES)))](draw(st.lists(records, max_size=8))).encode())
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 3))] = draw(
            st.one_of(
                st.binary(max_size=4), st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b"\\", b"\n", b"NaN"])
            )
        )
    return bytes(data)


@QUICK
@given(data=st.one_of(st.binary(max_size=200), damaged()), small=st.booleans())
@example(data=b"[" * 5000, small=False)
@example(data=b'{"a":' * 5000, small=True)
@example(data=b"[\xff\xfe,{]}", small=True)
def test_no_byte_is_lost_and_nothing_is_raised(tmp_path, data, small):
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in SMALL_WINDOWS if small else ():
            patch.setattr(module, name, value)
        got = read_text(tmp_path, data)
    position = 0
    for record, offset, line, _ in got:
        assert offset >= position
        assert data[position:offset].strip(b"\xef\xbb\xbf \t\r\n\f\v,[]") == b""
        assert data[offset : offset + len(record)] == record
        assert line == data[:offset].count(b"\n") + 1
        position = offset + len(record)
    assert data[position:].strip(b"\xef\xbb\xbf \t\r\n\f\v,[]") == b""


MEASURE = """
import sys
from data_prep.processes import peak_rss_bytes
from data_prep.records.json_stream import read_blocks
from data_prep.records.source import Piece, Source

count = sum(len(block.records) for path in sys.argv[1:] for block in read_blocks(Source(Piece(path))))
print(count, peak_rss_bytes())
"""


@pytest.mark.parametrize("form", ["array", "lines"])
def test_memory_does_not_grow_with_the_file(tmp_path, form):
    record = json.dumps({"input": "x" * 500, "target": "y" * 500})
    peaks = []
    for megabytes in (10, 80):
        texts = [record] * (megabytes * 1000)
        data = "[\n" + ",\n".join(texts) + "\n]" if form == "array" else "\n".join(texts)
        (tmp_path / "a.json").write_text(data)
        output = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path / "a.json")],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONPATH": "."},
        ).stdout.split()
        assert int(output[0]) == len(texts)
        peaks.append(int(output[1]))
    assert peaks[1] < peaks[0] + (8 << 20)
