"""What there is to read: the files of the corpus, in a stable order, as units of work.

In: the two directories of `CorpusSettings`. Out: `UnitSpec`s, each with the fingerprint of the bytes it covers.

- Order: instruction before pretraining, then by relative path. Hidden files and directories are passed over.
- A source is the directory's kind or `kind/subdirectory` of the first level.
- A plain file above 32 MiB is cut into parts of about 16 MiB: JSON Lines at newlines, arrays where the text looks like
  the border of two elements (`data_prep.records.shard` joins parts that turn out to be cut wrongly).
- Of many small files, those next to each other share a unit. A group ends where the content hash of a file says so, so
  a new file changes the one group it falls into, about 1 MiB, and not all those behind it.

Cost: every byte is hashed once (5 GB/s a core); nothing is decompressed or parsed.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep import store
from data_prep.errors import CorpusError, NoCorpusError
from data_prep.places.address import RangeStream, is_address, list_files, read_range, without_secrets
from data_prep.places.download import RemoteFile, remove_stale
from data_prep.places.saved_dataset import Parts, without_bookkeeping
from data_prep.records.json_stream import BOM, HEAD_BYTES, find_form, find_opening
from data_prep.records.source import WHOLE, Piece, compression_of, table_of
from data_prep.records.tables import cut_table
from data_prep.records.user_reader import reader_fingerprint
from data_prep.settings import FORMATS, SUFFIXES, CorpusSettings

PART_BYTES = 16 << 20
BORDER_READ_BYTES = 64 << 10  # records are seldom longer
MIN_FILES_TO_GROUP = 64
GROUP_BYTES = 1 << 20
MAX_GROUP_BYTES = 8 << 20
SMALL_TABLE_BYTES = 4 << 20  # compressed, so 16 MiB of text perhaps
WAVE_BYTES = 1 << 30  # of remote files on this machine at once, and as much on its way
REMOTE_THREADS = 8  # they wait for the network
DIRECTORY_SETTINGS = {"instruction": "instruction_tuning_data_dir", "pretraining": "pretraining_data_dir"}


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus; its ``path`` is an address if it is ``remote``."""

    path: str
    kind: str
    source: str
    size: int
    remote: RemoteFile | None = None


@dataclass(frozen=True)
class UnitSpec:
    """A unit of records: the pieces it reads, one after another, and what its content depends on."""

    pieces: tuple[Piece, ...]
    hashes: tuple[str, ...]
    kind: str
    source: str
    size: int
    reader: dict[str, Any] | None = None
    reader_source: dict[str, Any] | None = None
    tokenizer_dir: Path | None = None

    @property
    def fingerprint(self) -> str:
        """Of bytes and of what they are read as; never of a path."""
        pieces = [
            [content, compression_of(piece.path), piece.form, piece.opening.hex(), piece.first, piece.last]
            for piece, content in zip(self.pieces, self.hashes, strict=True)
        ]
        return store.fingerprint(stage="records", kind=self.kind, pieces=pieces, reader=self.reader_source)


def find_files(corpus: CorpusSettings, cache_dir: Path | None = None) -> list[InputFile]:
    """Every input file in the stable order.

    :param cache_dir: where parts of remote files are kept meanwhile.

    :raises CorpusError: a directory that was asked for is missing or empty.
    :raises NoCorpusError: none was asked for, and there is no file in the default ones.
    """
    files: list[InputFile] = []
    problems = []
    for kind, setting in DIRECTORY_SETTINGS.items():
        directory = getattr(corpus, setting)
        if directory is None:
            continue
        any_name = corpus.reader is not None
        if any_name and is_address(directory):
            raise CorpusError(f"reader: it reads files of this machine; {without_secrets(directory)} is an address")
        if is_address(directory):
            found = list(_files_at(directory, kind, cache_dir))
        else:
            found = list(_files_below(Path(directory), kind, any_name))
        files += found
        if not found:
            problems.append((setting, directory))
    wanted = [(name, path) for name, path in problems if path != CorpusSettings.model_fields[name].default]
    if wanted:
        raise CorpusError(_nothing_to_read(wanted))
    if not files:
        raise NoCorpusError(_nothing_to_read(problems))
    return files


def plan_units(
    files: list[InputFile],
    corpus: CorpusSettings,
    num_workers: int,
    tokenizer_dir: Path | None = None,
    cache_dir: Path | None = None,
) -> Iterator[UnitSpec]:
    """The units of all files, in the order of the files; a user's reader may ask for the tokenizer.

    They come one after another because those of remote files are fetched for it, up to `WAVE_BYTES` ahead.
    """
    reader = corpus.reader
    source = None if reader is None else reader_fingerprint(reader, tokenizer_dir, cache_dir)
    specs = (
        UnitSpec((piece,), (content,), file.kind, file.source, _piece_size(piece, file), reader, source, tokenizer_dir)
        for file, piece, content in _hashed(files, num_workers, whole=reader is not None)
    )
    return _grouped(specs) if len(files) >= MIN_FILES_TO_GROUP else specs


def waves(specs: Iterable[UnitSpec]) -> Iterator[list[UnitSpec]]:
    """Units to make before more is fetched; those of local files all at once."""
    wave: list[UnitSpec] = []
    size = 0
    for spec in specs:
        wave.append(spec)
        size += spec.size if spec.pieces[0].remote else 0
        if size >= WAVE_BYTES:
            yield wave
            wave, size = [], 0
    yield wave


def _hashed(files: list[InputFile], num_workers: int, whole: bool) -> Iterator[tuple[InputFile, Piece, str]]:
    """Every piece with the hash of its bytes. Those of remote files are fetched for it, and the hashes remembered."""
    wanted = max(num_workers, REMOTE_THREADS) if any(file.remote for file in files) else num_workers
    with ThreadPoolExecutor(wanted) as threads:
        for batch in _batches(_pieces(files, whole)):
            hashes = threads.map(_hash_piece, [piece for _, piece, content in batch if content is None])
            done = [(file, piece, content or next(hashes)) for file, piece, content in batch]
            _remember([now for now, before in zip(done, batch, strict=True) if before[2] is None])
            yield from done


Known = tuple[InputFile, Piece, str | None]
"""A piece of a file, and the hash of its bytes if it is known."""


def _pieces(files: list[InputFile], whole: bool) -> Iterator[Known]:
    for file in files:
        known = file.remote.known() if file.remote else {}
        hashes = known.get("hashes", {})
        if whole:
            pieces = [Piece(file.path)]
        elif "cut" in known:
            pieces = [_piece_of(file, **plain) for plain in known["cut"]]
        else:
            pieces = _cut(file)
            if file.remote and (len(pieces) > 1 or pieces[0].form in WHOLE):  # what was fetched to know it
                file.remote.remember(cut=[piece.plain() for piece in pieces])
        yield from ((file, piece, hashes.get(piece.range)) for piece in pieces)


def _piece_of(file: InputFile, opening: str, **plain: Any) -> Piece:
    return Piece(file.path, opening=bytes.fromhex(opening), remote=file.remote, **plain)


def _batches(pieces: Iterator[Known]) -> Iterator[list[Known]]:
    """As many as are fetched before they are used: WAVE_BYTES of remote files, and local ones without limit."""
    batch: list[Known] = []
    size = 0
    for file, piece, content in pieces:
        batch.append((file, piece, content))
        size += _piece_size(piece, file) if file.remote and content is None else 0
        if size >= WAVE_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _remember(found: list[tuple[InputFile, Piece, str]]) -> None:
    by_file: dict[RemoteFile, dict[str, str]] = {}
    for file, piece, content in found:
        if file.remote:
            by_file.setdefault(file.remote, {})[piece.range] = content
    for remote, hashes in by_file.items():
        remote.remember(hashes=hashes)


def join(first: UnitSpec, second: UnitSpec) -> UnitSpec:
    """One unit for two neighbouring parts of a file that must be read together."""
    piece = replace(first.pieces[0], stop=second.pieces[0].stop, last=second.pieces[0].last)
    return replace(first, pieces=(piece,), hashes=(_hash_piece(piece),), size=first.size + second.size)


def _files_below(directory: Path, kind: str, any_name: bool) -> Iterator[InputFile]:
    if directory.is_file():
        raise CorpusError(f"{DIRECTORY_SETTINGS[kind]}: {directory} is a file; give the directory it is in")
    found: dict[Parts, Path] = {}
    seen = set()
    for parent, directories, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(parent)
        directories[:] = [name for name in directories if not name.startswith(".") and real not in seen]
        if real not in seen:
            paths = [Path(parent, name) for name in names if not name.startswith(".")]
            found |= {path.relative_to(directory).parts: path for path in paths}
        seen.add(real)
    chosen = set(found)
    if not any_name:
        chosen = without_bookkeeping(chosen, lambda parts: found[parts].read_bytes(), str(directory))
    for parts in sorted(chosen):
        if (any_name or parts[-1].endswith(SUFFIXES)) and found[parts].is_file():
            yield _input_file(found[parts], parts, kind)


def _files_at(address: str, kind: str, cache_dir: Path | None) -> Iterator[InputFile]:
    """The same at an address."""
    if cache_dir is None:
        raise CorpusError(f"{address}: no directory to keep its parts in meanwhile")
    remove_stale(cache_dir)
    listed = {file.parts: file for file in list_files(address) if not any(part.startswith(".") for part in file.parts)}

    def read(parts: Parts) -> bytes:
        return read_range(listed[parts].address, 0, listed[parts].size)

    for parts in sorted(without_bookkeeping(set(listed), read, address)):
        if parts[-1].endswith(SUFFIXES):
            file = listed[parts]
            remote = RemoteFile(file.address, file.version, file.size, str(cache_dir))
            yield InputFile(file.address, kind, _source(kind, parts), file.size, remote)


def _source(kind: str, parts: Parts) -> str:
    return kind if len(parts) == 1 else f"{kind}/{parts[0]}"


def _input_file(path: Path, parts: Parts, kind: str) -> InputFile:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise CorpusError(f"{os.fsencode(path)!r}: the name is not UTF-8; rename the file") from None
    if not os.access(path, os.R_OK):
        raise CorpusError(f"{path}: not readable; check its permissions")
    return InputFile(str(path), kind, _source(kind, parts), path.stat().st_size)


def _nothing_to_read(problems: list[tuple[str, str]]) -> str:
    if not problems:
        return "No corpus: give --instruction_tuning_data_dir, --pretraining_data_dir or both"
    empty = f"holds no {', '.join(FORMATS)} file"
    lines = [
        f"--{name}: {path} {empty if is_address(path) or os.path.exists(path) else 'does not exist'}"
        for name, path in problems
    ]
    return "\n".join(["Nothing to read:", *lines, "Give a directory with data, or null to do without it."])


def _cut(file: InputFile) -> list[Piece]:
    """The parts of a large file; a small or compressed one, and one of CSV, is one piece."""
    table = table_of(file.path)
    whole = [Piece(file.path, form=table, remote=file.remote)]
    if table in WHOLE and file.size > SMALL_TABLE_BYTES:
        return cut_table(whole[0], file.size)
    if table or file.size <= 2 * PART_BYTES or compression_of(file.path):
        return whole
    with RangeStream(file.path, file.size) if file.remote else open(file.path, "rb") as stream:
        head = stream.read(HEAD_BYTES)
        form = find_form(head.removeprefix(BOM))
        opening = find_opening(head) if form == "array" else b""
        border = b"\n" if form == "lines" else opening
        if not border or form == "values":
            return whole
        cuts = list(_borders(stream, border, file.size))
    edges = [0, *cuts, file.size]
    return [
        Piece(file.path, start, stop, form, opening, start == 0, stop == file.size, file.remote)
        for start, stop in pairwise(edges)
    ]


def _borders(stream: Any, border: bytes, size: int) -> Iterator[int]:
    """One offset for each multiple of PART_BYTES: where the next border after it is."""
    place = PART_BYTES
    while place < size - PART_BYTES // 2:
        found = _find(stream, border, place)
        if found is None:
            return
        cut = found + 1 if border == b"\n" else found
        if cut >= size:
            return
        yield cut
        place = max(place + PART_BYTES, cut + PART_BYTES // 2)


def _find(stream: Any, border: bytes, start: int) -> int | None:
    kept = b""
    stream.seek(start)
    while chunk := stream.read(BORDER_READ_BYTES):
        data = kept + chunk
        if (found := data.find(border)) >= 0:
            return stream.tell() - len(data) + found
        kept = data[-len(border) + 1 :] if len(border) > 1 else b""
    return None


def _grouped(specs: Iterable[UnitSpec]) -> Iterator[UnitSpec]:
    """Small neighbouring files as one unit, which ends after a file with probability size / GROUP_BYTES."""
    group: list[UnitSpec] = []
    size = 0
    for spec in specs:
        if group and (spec.source != group[0].source or size + spec.size > MAX_GROUP_BYTES):
            yield _merged(group)
            group, size = [], 0
        if spec.size >= GROUP_BYTES and not group:
            yield spec
            continue
        group.append(spec)
        size += spec.size
        if int(spec.hashes[0][:8], 16) / 2**32 < spec.size / GROUP_BYTES:
            yield _merged(group)
            group, size = [], 0
    if group:
        yield _merged(group)


def _merged(group: list[UnitSpec]) -> UnitSpec:
    pieces = tuple(spec.pieces[0] for spec in group)
    hashes = tuple(spec.hashes[0] for spec in group)
    return replace(group[0], pieces=pieces, hashes=hashes, size=sum(spec.size for spec in group))


def _hash_piece(piece: Piece) -> str:
    return store.hash_file(*piece.here())


def _piece_size(piece: Piece, file: InputFile) -> int:
    return (file.size if piece.stop is None else piece.stop) - piece.start
