"""Local files as a source: finds the files of a path, hashes them, and cuts them into pieces."""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from flare.data.sources.base import Piece, Source, group_pieces, missing_column, piece_bytes, reading_data
from flare.data.sources.file_formats import (
    COMPRESSIONS,
    KINDS,
    LineRange,
    RowGroups,
    WholeFile,
    holds_lines,
    is_compressed,
    kind_of,
)
from flare.data.sources.file_hashes import FileFacts, facts_of
from flare.errors import ConfigError, DataError, first_line, one_line
from flare.logs import log

BATCH_BYTES = 8 * 2**20
"""Maximum text of a parquet file that is decoded at once."""
COMPRESSION_RATIO = 3
"""Estimated bytes of text per byte of a compressed file, for the progress bar."""
LARGE_TXT_BYTES = 64 * 2**20
"""A larger .txt is probably not one document. Tokenising it as one needs about 300 bytes of memory per token."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
LFS_POINTER_BYTES = range(115, 200)
"""Possible sizes of a pointer: the line above, 64 hexadecimal digits and a number. Source: git-lfs, docs/spec.md."""
MAX_LISTED_FILES = 1000
"""Up to this number, a message about changed data names the files; above it, the folders."""


def find_files(path: Path, flag_and_value: str, excluded: Path | None = None) -> list[Path]:
    """The file itself, or all files of a known kind in a folder, sorted by name.

    Args:
        flag_and_value: the flag that named the path and its value, for messages.
        excluded: a folder whose files are excluded.

    Raises: ConfigError for a file of an unknown kind; DataError for a folder without data files or that cannot be
    read.
    """
    if path.is_file():
        if kind_of(path) is None:
            raise ConfigError(f"{flag_and_value}: cannot read {path.name!r}; known kinds: {known_kinds()}")
        return [path]
    paths = exclude_folder((p for p in files_below(path) if not is_hidden(p.relative_to(path))), excluded)
    files = known_files(paths)
    if not files:
        raise DataError(f"{flag_and_value}: the folder has no files of the kinds {known_kinds()}")
    log_kinds(flag_and_value, paths, files)
    return files


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders, also linked ones. Each folder is entered once, so circular links end.

    Raises: DataError when a folder cannot be read.
    """
    entered = set()
    with reading_data():
        for directory, names, files in os.walk(folder, onerror=_refuse, followlinks=True):
            place = os.path.realpath(directory)
            if place in entered:
                names.clear()
                continue
            entered.add(place)
            names.sort()  # of two links to one folder, always the same one is followed
            yield from (Path(directory, name) for name in files)


def _refuse(error: OSError) -> None:
    raise error


def exclude_folder(paths: Iterable[Path], folder: Path | None) -> list[Path]:
    """The paths that are not inside the folder."""
    resolved = folder and folder.resolve()
    return [path for path in paths if resolved is None or resolved not in path.resolve().parents]


def known_files(paths: list[Path]) -> list[Path]:
    """The files of a known kind among these, sorted by name.

    Raises: DataError for a broken link, as in a copy of the hub's ``snapshots`` without its ``blobs``.
    """
    known = sorted(filter(kind_of, paths))
    if broken := next((path for path in known if path.is_symlink() and not path.exists()), None):
        raise DataError(f"{broken} is a link to {os.readlink(broken)}, which does not exist")
    return [path for path in known if path.is_file()]


def log_kinds(flag_and_value: str, paths: list[Path], files: list[Path]) -> None:
    """Log which kinds are read and which are skipped, unless all files are of one known kind."""
    kinds = Counter(map(kind_of, files))
    others = {path.suffix or path.name for path in set(paths).difference(files)}
    if len(kinds) > 1 or others:
        read = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        left_out = f"; skips other kinds ({one_line(' '.join(sorted(others)))})" if others else ""
        log.info(f"{flag_and_value}: reads {read} files{left_out}")


def is_hidden(path: Path) -> bool:
    """Whether a file or a folder above it is hidden: tools keep their own files there (.cache, .git)."""
    return any(part.startswith(".") for part in path.parts)


def is_glob(name: str) -> bool:
    """Whether a name has wildcards."""
    return any(character in name for character in "*?[")


def match_files(pattern: str, flag_and_value: str, excluded: Path | None = None) -> list[Path]:
    """All files of a known kind that a glob matches, sorted by name; ``**`` matches any number of folders.

    Args:
        flag_and_value, excluded: as in ``find_files``.

    Raises: ConfigError when it matches no file.
    """
    matches = exclude_folder(map(Path, glob.glob(pattern, recursive=True)), excluded)
    files = known_files(matches)
    if not files:
        others = f" (it matches {len(matches)} other files)" if matches else f" (looked in {Path.cwd()})"
        raise ConfigError(f"{flag_and_value}: matches no file of the kinds {known_kinds()}{others}")
    log_kinds(flag_and_value, [match for match in matches if not match.is_dir()], files)
    return files


def glob_root(pattern: str) -> Path:
    """The folder that contains all matches of a glob: its path before the first wildcard."""
    return Path(*takewhile(lambda part: not is_glob(part), Path(pattern).parts))


def known_kinds() -> str:
    """The known kinds of files, for messages."""
    return f"{' '.join(KINDS)}; all except .parquet also with {' or '.join(COMPRESSIONS)} appended"


class HashedFiles(Source):
    """A source whose identity is the content of local files.

    Args:
        root: the folder of the files; messages about changed data show paths relative to it.
        memo_dir: where hashes are kept for the next start.
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
        """Hash and cuts of every file. The first call reads each file for which ``memo_dir`` has no entry."""
        if self._facts is None:
            self._facts = facts_of(self.files, self.memo_dir, self.root)
        return self._facts

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.text_column.encode())
        for file, facts in zip(self.files, self.facts(), strict=True):
            digest.update(f"{kind_of(file)}:{facts.sha256}\0".encode())
        return f"files:{digest.hexdigest()}"

    def describe(self) -> dict[str, str]:
        """Size and hash of every file; of every folder when there are more than ``MAX_LISTED_FILES`` files."""
        names = [self.name_of(file) for file in self.files]
        sums = [f"{facts.size:,} bytes, sha256 {facts.sha256[:12]}" for facts in self.facts()]
        listed = {f"file {name}": content for name, content in zip(names, sums, strict=True)}
        if len(self.files) > MAX_LISTED_FILES:
            listed = by_folder(names, self.facts())
        return {"text_column": self.text_column} | listed

    def name_of(self, file: Path) -> str:
        """The path relative to ``root``, which is unique; the file's own name if ``root`` is the file."""
        path = Path(os.path.abspath(file))  # ``datasets`` returns absolute paths for relative ones
        root = Path(os.path.abspath(self.root or file.parent))
        return str(path.relative_to(root)) if path != root and path.is_relative_to(root) else file.name


@reading_data()
def usable_files(files: list[Path]) -> list[Path]:
    """The files that are not empty. Other tools write empty files when they have no rows, so these cause a warning.

    Raises: DataError when all files are empty, when a .parquet or compressed file is empty (both have some bytes even
    without rows), and for a Git LFS pointer, which a clone without Git LFS has in place of the data.
    """
    sizes = [file.stat().st_size for file in files]
    empty = [file for file, size in zip(files, sizes, strict=True) if size == 0]
    for file, size in zip(files, sizes, strict=True):
        if size in LFS_POINTER_BYTES and file.read_bytes().startswith(LFS_POINTER):
            raise DataError(f"{file} is a Git LFS pointer, not the data; download it with git lfs pull")
    if cut := [
        file for file in empty if len(empty) == len(files) or is_compressed(file) or kind_of(file) == ".parquet"
    ]:
        raise DataError(f"{cut[0]} is empty (0 bytes)")
    if not empty:
        return files
    log.warning(f"skips {len(empty)} of {len(files)} files because they are empty (0 bytes), first {empty[0]}")
    left_out = set(empty)
    return [file for file in files if file not in left_out]


class FileSource(HashedFiles):
    """Local files of known kinds, read in order."""

    @reading_data()
    def pieces(self) -> list[Piece]:
        max_bytes = piece_bytes(sum(facts.size for facts in self.facts()))
        parts = []
        for file, facts in zip(self.files, self.facts(), strict=True):
            parts += self._pieces_of(file, facts, max_bytes)
        return group_pieces(parts, max_bytes)

    def _pieces_of(self, file: Path, facts: FileFacts, max_bytes: int) -> list[tuple[Piece, int]]:
        """(piece, bytes) pairs of one file. Compressed files, JSON arrays and .csv files are not cut: in a .csv a
        newline may be inside a value."""
        kind = kind_of(file)
        if kind == ".parquet":
            return row_groups(file, self.text_column, max_bytes)
        if kind == ".txt" and facts.size > LARGE_TXT_BYTES:
            log.warning(
                f"{file} is read as one document of {facts.size:,} bytes; a .jsonl file can hold one document per line"
            )
        if not holds_lines(file):
            text_bytes = facts.size * (COMPRESSION_RATIO if is_compressed(file) else 1)
            return [(WholeFile(file, kind, self.text_column, text_bytes), facts.size)]
        starts = [(0, 1), *facts.cuts]
        ends = [byte for byte, _ in facts.cuts] + [facts.size]
        return [
            (LineRange(file, self.text_column, begin, end, line), end - begin)
            for (begin, line), end in zip(starts, ends, strict=True)
        ]


def by_folder(names: list[str], facts: list[FileFacts]) -> dict[str, str]:
    """Number, size and hash of the files of each folder."""
    folders: dict[str, list[FileFacts]] = {}
    for name, fact in zip(names, facts, strict=True):
        folders.setdefault(str(Path(name).parent), []).append(fact)
    described = {}
    for folder, inside in folders.items():
        digest = hashlib.sha256("".join(fact.sha256 for fact in inside).encode()).hexdigest()[:12]
        size = sum(fact.size for fact in inside)
        described[f"folder {folder}"] = f"{len(inside):,} files, {size:,} bytes, sha256 {digest}"
    return described


def row_groups(file: Path, column: str, max_bytes: int) -> list[tuple[Piece, int]]:
    """(piece, bytes) pairs of a parquet file; row groups are never cut.

    Raises: ConfigError when the column does not exist; DataError when the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a parquet file: {first_line(error)}") from error
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
        if end < len(sizes) and size + sizes[end][1] <= max_bytes:
            continue
        rows = sum(n for n, _ in sizes[begin:end])
        batch_rows = max(1, min(1000, BATCH_BYTES * rows // max(size, 1)))
        parts.append((RowGroups(file, column, begin, end, first_row, batch_rows, size), size))
        first_row, begin = first_row + rows, end
    return parts
