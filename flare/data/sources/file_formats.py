"""Reads the rows of one local file: .jsonl, .json, .txt, .csv or .parquet. All except .parquet may be .gz or .zst.

A .txt file is one document. In the other formats each line, array element or record is one row.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flare.data.sources.base import PIECE_BYTES, BadRow, Piece, Row, missing_column
from flare.data.sources.records import UNDECODED, array_elements, csv_values
from flare.errors import DataError, first_line

KINDS = (".jsonl", ".json", ".txt", ".parquet", ".csv")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
OPEN_OBJECT = re.compile(rb"\{[ \t]*\r?\n")
BOM = b"\xef\xbb\xbf"
START_BYTES = 1024
"""Bytes at the start of a .json file that decide whether it has JSON lines or one array."""


def kind_of(file: Path) -> str | None:
    """The file's kind, one of ``KINDS``, ignoring case and a .gz or .zst suffix; None for other files."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        kind = suffixes[0] if len(suffixes) == 2 else None
        return kind if kind in KINDS and kind != ".parquet" else None
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def holds_lines(file: Path) -> bool:
    """Whether a file has uncompressed JSON lines, so that it can be cut at any newline. A .jsonl has; for a .json its
    first bytes decide."""
    kind = kind_of(file)
    if is_compressed(file) or kind not in (".jsonl", ".json"):
        return False
    if kind == ".jsonl":
        return True
    with open(file, "rb") as stream:
        return _is_lines(stream.read(START_BYTES))


def _is_lines(start: bytes) -> bool:
    """Whether a .json file that starts with these bytes has one object per line; many .json data sets do."""
    start = start.removeprefix(BOM).lstrip()
    return start[:1] != b"[" and not OPEN_OBJECT.match(start)


def is_compressed(file: Path) -> bool:
    """Whether the file is compressed. Such a file can only be read from its start."""
    return file.suffix.lower() in COMPRESSIONS


@contextmanager
def open_bytes(file: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed.

    Raises: DataError when a compressed file is damaged or truncated.
    """
    if not is_compressed(file):
        with open(file, "rb") as stream:
            yield stream
        return
    import pyarrow

    with pyarrow.OSFile(str(file)) as packed:
        unpacked = pyarrow.CompressedInputStream(packed, COMPRESSIONS[file.suffix.lower()])
        try:
            with io.BufferedReader(unpacked, 2**20) as stream:
                yield stream
        except OSError as error:
            raise DataError(f"{file} is damaged or truncated ({first_line(error)}); download it again") from error


@dataclass(frozen=True)
class WholeFile(Piece):
    """All rows of one file."""

    file: Path
    kind: str
    column: str
    expected_bytes: int = PIECE_BYTES

    def rows(self) -> Iterator[Row]:
        readers = {".txt": _read_txt, ".jsonl": _read_lines, ".json": _read_json, ".csv": _read_csv}
        with open_bytes(self.file) as stream:
            yield from readers[self.kind](stream, self.file, self.column)


@dataclass(frozen=True)
class LineRange(Piece):
    """The lines of a .jsonl file in the bytes [begin, end). ``first_line`` is the number of the line at ``begin``."""

    file: Path
    column: str
    begin: int
    end: int
    first_line: int

    @property
    def expected_bytes(self) -> int:
        return self.end - self.begin

    def rows(self) -> Iterator[Row]:
        with open(self.file, "rb") as stream:
            stream.seek(self.begin)
            yield from _parse_lines(self._lines(stream), self.file, self.column, self.first_line)

    def _lines(self, stream: BinaryIO) -> Iterator[bytes]:
        left = self.end - self.begin
        while left > 0 and (line := stream.readline()):
            left -= len(line)
            yield line


@dataclass(frozen=True)
class RowGroups(Piece):
    """Row groups [begin, end) of a .parquet file. ``first_row`` is the index of their first row."""

    file: Path
    column: str
    begin: int
    end: int
    first_row: int
    batch_rows: int = 1000
    expected_bytes: int = PIECE_BYTES

    def rows(self) -> Iterator[Row]:
        import pyarrow.parquet

        number = self.first_row
        try:
            with pyarrow.parquet.ParquetFile(self.file) as table:
                groups = list(range(self.begin, self.end))
                for batch in table.iter_batches(self.batch_rows, row_groups=groups, columns=[self.column]):
                    for value in values_of(batch.column(0)):
                        yield Row(value, f"{self.file}[{number}]")
                        number += 1
        except (pyarrow.ArrowException, OSError) as error:
            reason = first_line(error)
            raise DataError(f"{self.file} is damaged after row {number} ({reason}); download it again") from error


def values_of(array: object) -> list[object]:
    """Python values of an Arrow array. A text that is not UTF-8 becomes a BadRow."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in array]


def _value(scalar: object) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return BadRow(f"is not UTF-8 (byte {error.start})")


def _column(record: object, column: str, file: Path, first: bool) -> object:
    """The text of a record. Raises: ConfigError when the first record of a file does not have the column."""
    if not isinstance(record, dict):
        return BadRow("is not an object")
    if column in record:
        return record[column]
    if first:
        raise missing_column(column, file, sorted(map(str, record)))
    return BadRow(f"has no column {column!r}")


def _read_txt(stream: BinaryIO, file: Path, column: str) -> Iterator[Row]:
    try:
        yield Row(stream.read().removeprefix(BOM).decode("utf-8"), str(file))
    except UnicodeDecodeError as error:
        yield Row(BadRow(f"is not UTF-8 (byte {error.start})"), str(file))


def _read_lines(stream: BinaryIO, file: Path, column: str) -> Iterator[Row]:
    yield from _parse_lines(stream, file, column, 1)


def _parse_lines(lines: Iterator[bytes], file: Path, column: str, first_line: int) -> Iterator[Row]:
    first = first_line == 1  # no record was read yet
    for number, line in enumerate(lines, first_line):
        where = f"{file}:{number}"
        line = line.removeprefix(BOM) if number == 1 else line
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Row(BadRow(f"is not UTF-8 (byte {error.start})"), where)
        except (ValueError, RecursionError) as error:  # not JSON, or too many digits or levels of nesting
            yield Row(BadRow(f"is not JSON ({getattr(error, 'msg', error)})"), where)
        else:
            yield Row(_column(record, column, file, first), where)
            first = False


def _read_json(stream: BinaryIO, file: Path, column: str) -> Iterator[Row]:
    start = stream.peek(START_BYTES)[:START_BYTES]
    if _is_lines(start):
        yield from _read_lines(stream, file, column)
        return
    if OPEN_OBJECT.match(start.removeprefix(BOM).lstrip()):
        raise DataError(
            f"{file} is one JSON object over several lines; give an array of objects, or one object per line"
        )
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
    number = 0
    try:
        for number, record in enumerate(array_elements(text)):
            yield Row(_valid(_column(record, column, file, number == 0)), f"{file}[{number}]")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON after element {number}: {getattr(error, 'msg', error)}") from error


def _read_csv(stream: BinaryIO, file: Path, column: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        for line, value in csv_values(text, file, column):
            yield Row(_valid(value), f"{file}:{line}")
    except csv.Error as error:
        raise DataError(f"{file} is not a CSV file: {error}") from error


def _valid(value: object) -> object:
    """The value, or a BadRow for text with bytes that could not be decoded (``errors="surrogateescape"``)."""
    return BadRow("is not UTF-8") if isinstance(value, str) and UNDECODED.search(value) else value
