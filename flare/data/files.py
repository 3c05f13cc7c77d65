"""Local files as a source: which files a path names, their identity, and how they are cut into pieces."""

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from flare.data.file_facts import FileFacts, facts_of
from flare.data.file_formats import (
    ARCHIVES,
    KINDS,
    LineRange,
    RowGroups,
    WholeFile,
    holds_lines,
    is_archive,
    kind_of,
)
from flare.data.rows import Piece, Source, gather, missing_column, piece_bytes, reading_data
from flare.errors import ConfigError, DataError, first_line

BATCH_BYTES = 8 * 2**20
"""Text of a parquet file that is decoded at once."""
PACKED = 3
"""Bytes of text in a byte of an archive: a guess, for the progress."""
MAX_LISTED_FILES = 1000
"""Files that are told apart when data has changed; of a larger corpus, folders are."""


def find_files(path: Path, asked: str, without: Path | None = None) -> list[Path]:
    """The file itself, or all files of a known kind in a folder, by name; none of those in the folder ``without``.

    Args:
        asked: the option that named the path, and its value.

    Raises: ConfigError for a file of no known kind; DataError for a folder without any.
    """
    if path.is_file():
        if kind_of(path) is None:
            raise ConfigError(f"{asked}: cannot read {path.name!r}; known: {known_kinds()}")
        return [path]
    files = readable((p for p in files_below(path) if not is_hidden(p.relative_to(path))), without)
    if not files:
        raise DataError(f"{asked}: the folder holds none of {known_kinds()}")
    return files


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder and its subfolders, linked ones too; each is entered once, so a ring of links ends."""
    entered = set()
    for directory, names, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(directory)
        if place in entered:
            names.clear()
            continue
        entered.add(place)
        names.sort()  # of two links to one folder it is always the same that counts
        yield from (Path(directory, name) for name in files)


def readable(paths: Iterable[Path], without: Path | None) -> list[Path]:
    """The files of a known kind among these, by name; none of those in the folder ``without``."""
    left_out = without and without.resolve()
    files = (path for path in paths if kind_of(path) and path.is_file())
    return sorted(file for file in files if left_out is None or left_out not in file.resolve().parents)


def is_hidden(path: Path) -> bool:
    """Whether a file or a folder above it is hidden: what tools leave there (.cache, .git) is no data."""
    return any(part.startswith(".") for part in path.parts)


def is_glob(name: str) -> bool:
    """Whether a name holds wildcards."""
    return any(character in name for character in "*?[")


def match_files(pattern: str, asked: str, without: Path | None = None) -> list[Path]:
    """All files of a known kind that a glob matches, by name; ``**`` goes through folders.

    Args:
        asked, without: as of ``find_files``.

    Raises: ConfigError when it matches none.
    """
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    files = readable(matches, without)
    if not files:
        others = f" (it matches {len(matches)} other files)" if matches else f" (looked in {Path.cwd()})"
        raise ConfigError(f"{asked}: matches no file of the kinds {known_kinds()}{others}")
    return files


def glob_root(pattern: str) -> Path:
    """The folder that all matches of a glob lie in: what comes before its first wildcard."""
    return Path(*takewhile(lambda part: not is_glob(part), Path(pattern).parts))


def known_kinds() -> str:
    """The kinds of files, for messages."""
    return f"{' '.join(KINDS)}, and these but .parquet with {' or '.join(ARCHIVES)} behind"


class HashedFiles(Source):
    """A source whose identity is the content of local files.

    Args:
        root: the folder that they lie in; in messages about changed data files are named from there.
        memo_dir: where it is noted what was read of them, for the next start.
    """

    def __init__(
        self, files: list[Path], text_column: str, root: Path | None = None, memo_dir: Path | None = None
    ) -> None:
        self.files = files
        self.text_column = text_column
        self.root = root
        self.memo_dir = memo_dir
        self._facts: list[FileFacts] | None = None
        with reading_data():
            empty = next((file for file in files if file.stat().st_size == 0), None)
        if empty:
            raise DataError(f"{empty} is empty (0 bytes)")

    @reading_data()
    def facts(self) -> list[FileFacts]:
        """Hash and cuts of every file; the first call reads those once of which nothing is noted."""
        if self._facts is None:
            self._facts = facts_of(self.files, self.memo_dir)
        return self._facts

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.text_column.encode())
        for file, facts in zip(self.files, self.facts(), strict=True):
            digest.update(f"{kind_of(file)}:{facts.sha256}\0".encode())
        return f"files:{digest.hexdigest()}"

    def describe(self) -> dict[str, str]:
        """Size and hash of every file, or when there are very many, of every folder."""
        names = [self.name_of(file) for file in self.files]
        sums = [f"{facts.size:,} bytes, sha256 {facts.sha256[:12]}" for facts in self.facts()]
        listed = {f"file {name}": content for name, content in zip(names, sums, strict=True)}
        if len(self.files) > MAX_LISTED_FILES:
            listed = by_folder(names, self.facts())
        return {"text_column": self.text_column} | listed

    def name_of(self, file: Path) -> str:
        """A file's name from ``root``, which tells it from all others; of a file that is the root, its own name."""
        path = Path(os.path.abspath(file))  # ``datasets`` gives absolute paths, whatever it was given
        root = Path(os.path.abspath(self.root or file.parent))
        return str(path.relative_to(root)) if path != root and path.is_relative_to(root) else file.name


class FileSource(HashedFiles):
    """Local files of known kinds, one after the other by name."""

    @reading_data()
    def pieces(self) -> list[Piece]:
        most_bytes = piece_bytes(sum(facts.size for facts in self.facts()))
        parts = []
        for file, facts in zip(self.files, self.facts(), strict=True):
            parts += self._parts(file, facts, most_bytes)
        return gather(parts, most_bytes)

    def _parts(self, file: Path, facts: FileFacts, most_bytes: int) -> list[tuple[Piece, int]]:
        """(piece, bytes) of one file. An archive, a JSON array and a .csv, where a line may end within a value, are
        one piece each."""
        kind = kind_of(file)
        if kind == ".parquet":
            return row_groups(file, self.text_column, most_bytes)
        if not holds_lines(file):
            text_bytes = facts.size * (PACKED if is_archive(file) else 1)
            return [(WholeFile(file, kind, self.text_column, text_bytes), facts.size)]
        starts = [(0, 1), *facts.cuts]
        ends = [byte for byte, _ in facts.cuts] + [facts.size]
        return [
            (LineRange(file, self.text_column, begin, end, line), end - begin)
            for (begin, line), end in zip(starts, ends, strict=True)
        ]


def by_folder(names: list[str], facts: list[FileFacts]) -> dict[str, str]:
    """Number, size and hash of each folder's files, given the files' names and facts."""
    folders: dict[str, list[FileFacts]] = {}
    for name, fact in zip(names, facts, strict=True):
        folders.setdefault(str(Path(name).parent), []).append(fact)
    described = {}
    for folder, inside in folders.items():
        digest = hashlib.sha256("".join(fact.sha256 for fact in inside).encode()).hexdigest()[:12]
        size = sum(fact.size for fact in inside)
        described[f"folder {folder}"] = f"{len(inside):,} files, {size:,} bytes, sha256 {digest}"
    return described


def row_groups(file: Path, column: str, most_bytes: int) -> list[tuple[Piece, int]]:
    """(piece, bytes) of a parquet file; row groups are never cut.

    Raises: ConfigError when it has no such column; DataError when it is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is no parquet file: {first_line(error)}") from error
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
        if end < len(sizes) and size + sizes[end][1] <= most_bytes:
            continue
        rows = sum(n for n, _ in sizes[begin:end])
        batch_rows = max(1, min(1000, BATCH_BYTES * rows // max(size, 1)))
        parts.append((RowGroups(file, column, begin, end, first_row, batch_rows, size), size))
        first_row, begin = first_row + rows, end
    return parts
