"""Pieces and identity of a source that is too large to be read before the run: from names, sizes and file ends."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from flare.data.sources.base import PIECE_BYTES, Piece, Row, Source, group_pieces, reading_data
from flare.data.sources.file_formats import LineRange, WholeFile, holds_lines, kind_of
from flare.data.sources.files import MAX_LISTED_FILES, FileSource, row_groups
from flare.data.sources.hub import HubSource

TARGET_PIECES = 128
"""A small corpus is cut into about this number of pieces, so that each lane has several."""
MIN_PIECE_BYTES = 16 * 2**10
END_BYTES = 64 * 2**10
"""Bytes at the beginning and at the end of a file that determine its identity."""


@dataclass(frozen=True)
class LineSplit(Piece):
    """The lines of a .jsonl file that begin in the bytes [begin, end). Where lines begin is found when it is read."""

    file: Path
    column: str
    begin: int
    end: int

    def rows(self) -> Iterator[Row]:
        with open(self.file, "rb") as stream:
            first, last = self._line_from(stream, self.begin), self._line_from(stream, self.end)
        # Line numbers of the file would need all bytes before. So other pieces count from their own first line.
        for row in LineRange(self.file, self.column, first, last, 1 if first == 0 else 0).rows():
            yield row if first == 0 else Row(row.value, f"{row.where} (counted from 0 at byte {first})")

    @staticmethod
    def _line_from(stream: BinaryIO, byte: int) -> int:
        """The byte at which the first line begins that does not begin before ``byte``."""
        if byte == 0:
            return 0
        stream.seek(byte - 1)
        stream.readline()
        return stream.tell()


@reading_data()
def streamed_pieces(source: Source) -> list[Piece]:
    """The pieces of a source, if possible without reading its files."""
    if not isinstance(source, FileSource):
        return source.pieces()
    total = sum(file.stat().st_size for file in source.files)
    piece_bytes = min(max(total // TARGET_PIECES, MIN_PIECE_BYTES), PIECE_BYTES)
    parts = [part for file in source.files for part in _file_parts(file, source.text_column, piece_bytes)]
    return group_pieces(parts, piece_bytes)


def _file_parts(file: Path, column: str, piece_bytes: int) -> list[tuple[Piece, int]]:
    """(piece, bytes) of one file."""
    kind, size = kind_of(file), file.stat().st_size
    if kind == ".parquet":
        return row_groups(file, column, PIECE_BYTES)
    if not holds_lines(file):
        return [(WholeFile(file, kind, column), size)]
    cuts = [*range(0, size, piece_bytes), size]
    return [(LineSplit(file, column, begin, end), end - begin) for begin, end in pairwise(cuts)]


@reading_data()
def streamed_facts(source: Source) -> dict[str, str]:
    """The facts that identify a source, without reading it completely. For a local file: kind, size and both ends.

    A change in the middle of a file that keeps its size is not seen.
    """
    if isinstance(source, FileSource):
        files = {f"file {source.name_of(file)}": _file_fact(file) for file in source.files}
        return {"text_column": source.text_column} | files
    if isinstance(source, HubSource):
        names = ("dataset_name", "dataset_config", "dataset_split", "text_column")
        return {name: str(getattr(source.spec, name)) for name in names} | {"files": _hub_files(source)}
    return source.describe() | {"content": source.fingerprint()}


def streamed_identity(facts: dict[str, str]) -> str:
    """Identity of a source with these facts. As elsewhere, the names of files do not count."""
    return hashlib.sha256("\0".join(facts.values()).encode()).hexdigest()


def shortened(facts: dict[str, str]) -> dict[str, str]:
    """The facts as a checkpoint records them: very many files become one fact."""
    if len(facts) <= MAX_LISTED_FILES:
        return facts
    return {"files": f"{len(facts):,} files, sha256 of what is noted of them {streamed_identity(facts)[:32]}"}


def _file_fact(file: Path) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    with open(file, "rb") as stream:
        digest.update(stream.read(END_BYTES))
        stream.seek(max(0, size - END_BYTES))
        digest.update(stream.read(END_BYTES))
    return f"{kind_of(file)}, {size:,} bytes, sha256 of both ends {digest.hexdigest()[:32]}"


def _hub_files(source: HubSource) -> str:
    """Hash of the addresses of a streamed set's files; on the hub they hold the commit. ``datasets`` gives a streamed
    set no fingerprint, and knows the files as arguments of its innermost iterable."""
    iterable = source.dataset._ex_iterable
    while not hasattr(iterable, "kwargs"):
        iterable = iterable.ex_iterable
    names = [value for value in iterable.kwargs.values() if isinstance(value, list) and isinstance(value[0], str)]
    addresses = [name for group in names for name in group]
    digest = hashlib.sha256("\0".join(addresses).encode()).hexdigest()
    return f"{len(addresses):,} addresses, sha256 {digest[:32]}"
