"""Local files as a source: which files a path names, their identity, and how they are cut into pieces."""

import hashlib
from pathlib import Path

from flare.data.file_facts import FileFacts, read_facts
from flare.data.file_formats import KINDS, LineRange, RowGroups, WholeFile, is_archive, kind_of, missing_column
from flare.data.rows import PIECE_BYTES, Piece, Source, gather
from flare.errors import ConfigError, DataError

BATCH_BYTES = 8 * 2**20
"""Text of a parquet file that is decoded at once."""


def find_files(path: Path) -> list[Path]:
    """The file itself, or all files of a known kind in a folder, by name."""
    if path.is_file():
        if kind_of(path) is None:
            raise ConfigError(f"--dataset_name {path}: cannot read {path.suffix!r}; known: {' '.join(KINDS)}")
        return [path]
    files = sorted(p for p in path.rglob("*") if kind_of(p) and p.is_file())
    if not files:
        raise DataError(f"--dataset_name {path}: the folder holds none of {' '.join(KINDS)}")
    return files


class FileSource(Source):
    """Local files, one after the other by name."""

    def __init__(self, files: list[Path], text_column: str) -> None:
        self.files = files
        self.text_column = text_column
        self._facts: list[FileFacts] | None = None
        for file in files:
            if file.stat().st_size == 0:
                raise DataError(f"{file} is empty (0 bytes)")

    def facts(self) -> list[FileFacts]:
        """Hash and cuts of every file; the first call reads all of them once."""
        if self._facts is None:
            self._facts = [read_facts(file) for file in self.files]
        return self._facts

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.text_column.encode())
        for file, facts in zip(self.files, self.facts(), strict=True):
            digest.update(f"{kind_of(file)}:{facts.sha256}\0".encode())
        return f"files:{digest.hexdigest()}"

    def pieces(self) -> list[Piece]:
        parts = []
        for file, facts in zip(self.files, self.facts(), strict=True):
            parts += self._parts(file, facts)
        return gather(parts)

    def _parts(self, file: Path, facts: FileFacts) -> list[tuple[Piece, int]]:
        """(piece, bytes) of one file."""
        kind = kind_of(file)
        if kind == ".parquet":
            return row_groups(file, self.text_column)
        if kind != ".jsonl" or is_archive(file):
            return [(WholeFile(file, kind, self.text_column), facts.size)]
        starts = [(0, 1), *facts.cuts]
        ends = [byte for byte, _ in facts.cuts] + [facts.size]
        return [
            (LineRange(file, self.text_column, begin, end, line), end - begin)
            for (begin, line), end in zip(starts, ends, strict=True)
        ]


def row_groups(file: Path, column: str) -> list[tuple[Piece, int]]:
    """(piece, bytes) of a parquet file.

    Raises: ConfigError when it has no such column; DataError when it is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is no parquet file: {str(error).splitlines()[0]}") from error
    with table:
        names = table.schema_arrow.names
        if column not in names:
            raise missing_column(column, file, names)
        groups = [table.metadata.row_group(n) for n in range(table.metadata.num_row_groups)]
    sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    parts: list[tuple[Piece, int]] = []
    first_row = begin = 0
    for end in range(1, len(sizes) + 1):
        size = sum(s for _, s in sizes[begin:end])
        if end < len(sizes) and size + sizes[end][1] <= PIECE_BYTES:
            continue
        rows = sum(n for n, _ in sizes[begin:end])
        batch_rows = max(1, min(1000, BATCH_BYTES * rows // max(size, 1)))
        parts.append((RowGroups(file, column, begin, end, first_row, batch_rows), size))
        first_row, begin = first_row + rows, end
    return parts
