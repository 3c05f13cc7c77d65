"""Local files as a source: which files a path names, their identity, and how they are cut into pieces."""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from flare.data.sources.base import Piece, Source, gather, missing_column, piece_bytes, reading_data
from flare.data.sources.file_formats import (
    ARCHIVES,
    KINDS,
    LineRange,
    RowGroups,
    WholeFile,
    holds_lines,
    is_archive,
    kind_of,
)
from flare.data.sources.file_hashes import FileFacts, facts_of
from flare.errors import ConfigError, DataError, first_line, one_line
from flare.logs import log

BATCH_BYTES = 8 * 2**20
"""Text of a parquet file that is decoded at once."""
PACKED = 3
"""Bytes of text in a byte of an archive: a guess, for the progress."""
LARGE_TXT_BYTES = 64 * 2**20
"""A .txt beyond that is hardly one document. Whole, it takes some 300 bytes a token while it is tokenised."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
LFS_POINTER_BYTES = range(115, 200)
"""Size of one: the line above, 64 hexadecimal digits and a number. Source: git-lfs, docs/spec.md."""
MAX_LISTED_FILES = 1000
"""Files that are told apart when data has changed; of a larger corpus, folders are."""


def find_files(path: Path, asked: str, without: Path | None = None) -> list[Path]:
    """The file itself, or all files of a known kind in a folder, by name; none of those in the folder ``without``.

    Args:
        asked: the option that named the path, and its value.

    Raises: ConfigError for a file of no known kind; DataError for a folder without any, or that cannot be read.
    """
    if path.is_file():
        if kind_of(path) is None:
            raise ConfigError(f"{asked}: cannot read {path.name!r}; known: {known_kinds()}")
        return [path]
    paths = outside((p for p in files_below(path) if not is_hidden(p.relative_to(path))), without)
    files = readable(paths)
    if not files:
        raise DataError(f"{asked}: the folder holds none of {known_kinds()}")
    tell_kinds(asked, paths, files)
    return files


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder and its subfolders, linked ones too; each is entered once, so a ring of links ends.

    Raises: DataError for a folder that cannot be read.
    """
    entered = set()
    with reading_data():
        for directory, names, files in os.walk(folder, onerror=_refuse, followlinks=True):
            place = os.path.realpath(directory)
            if place in entered:
                names.clear()
                continue
            entered.add(place)
            names.sort()  # of two links to one folder it is always the same that counts
            yield from (Path(directory, name) for name in files)


def _refuse(error: OSError) -> None:
    raise error


def outside(paths: Iterable[Path], folder: Path | None) -> list[Path]:
    """The paths that do not lie in the folder."""
    left_out = folder and folder.resolve()
    return [path for path in paths if left_out is None or left_out not in path.resolve().parents]


def readable(paths: list[Path]) -> list[Path]:
    """The files of a known kind among these, by name.

    Raises: DataError for a link whose file is gone: a copy of the hub's ``snapshots`` without its ``blobs`` has them.
    """
    known = sorted(filter(kind_of, paths))
    if broken := next((path for path in known if path.is_symlink() and not path.exists()), None):
        raise DataError(f"{broken} is a link to {os.readlink(broken)}, which is not there")
    return [path for path in known if path.is_file()]


def tell_kinds(asked: str, paths: list[Path], files: list[Path]) -> None:
    """Say what is read of the paths and what is not, unless it is all of them and of one kind."""
    kinds = Counter(map(kind_of, files))
    others = {path.suffix or path.name for path in set(paths).difference(files)}
    if len(kinds) > 1 or others:
        read = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        left_out = f"; leaves out what is of other kinds ({one_line(' '.join(sorted(others)))})" if others else ""
        log.info(f"{asked}: reads {read} files{left_out}")


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
    matches = outside(map(Path, glob.glob(pattern, recursive=True)), without)
    files = readable(matches)
    if not files:
        others = f" (it matches {len(matches)} other files)" if matches else f" (looked in {Path.cwd()})"
        raise ConfigError(f"{asked}: matches no file of the kinds {known_kinds()}{others}")
    tell_kinds(asked, [match for match in matches if not match.is_dir()], files)
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
        self.files = usable_files(files)
        self.text_column = text_column
        self.root = root
        self.memo_dir = memo_dir
        self._facts: list[FileFacts] | None = None

    @reading_data()
    def facts(self) -> list[FileFacts]:
        """Hash and cuts of every file; the first call reads those once of which nothing is noted."""
        if self._facts is None:
            self._facts = facts_of(self.files, self.memo_dir, self.root)
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


@reading_data()
def usable_files(files: list[Path]) -> list[Path]:
    """The files that hold something; empty ones among them are warned of: other tools write them for lack of rows.

    Raises: DataError when all are empty, for an empty one of a kind that has some bytes even without rows, and for
    what a clone of the hub without Git LFS has in place of its files.
    """
    sizes = [file.stat().st_size for file in files]
    empty = [file for file, size in zip(files, sizes, strict=True) if size == 0]
    for file, size in zip(files, sizes, strict=True):
        if size in LFS_POINTER_BYTES and file.read_bytes().startswith(LFS_POINTER):
            raise DataError(f"{file} is a pointer of Git LFS, not the data; get it by git lfs pull")
    if cut := [file for file in empty if len(empty) == len(files) or is_archive(file) or kind_of(file) == ".parquet"]:
        raise DataError(f"{cut[0]} is empty (0 bytes)")
    if not empty:
        return files
    log.warning(f"leaves out {len(empty)} of {len(files)} files, which hold nothing (0 bytes), first {empty[0]}")
    left_out = set(empty)
    return [file for file in files if file not in left_out]


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
        if kind == ".txt" and facts.size > LARGE_TXT_BYTES:
            log.warning(f"{file} is read as one document of {facts.size:,} bytes; a .jsonl holds one a line")
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
