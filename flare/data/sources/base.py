"""The interface of all sources: rows in a fixed order, cut into pieces that worker processes read independently."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flare.errors import ConfigError, DataError, nearest, one_line

PIECE_BYTES = 32 * 2**20
"""Maximum size of a piece if its format can be cut: a few seconds of tokenising; 10 GB are a few hundred pieces."""
MIN_PIECES = 64
"""A small corpus is cut into this number of pieces, so that all workers finish at nearly the same time."""
MIN_PIECE_BYTES = 2**20
"""Minimum size of a piece. In smaller ones the overhead of files and messages would be noticeable."""


def piece_bytes(total_bytes: int) -> int:
    """Maximum bytes of a piece, for a corpus or file of ``total_bytes``."""
    return min(max(total_bytes // MIN_PIECES, MIN_PIECE_BYTES), PIECE_BYTES)


@dataclass(frozen=True)
class Row:
    """An unchecked value that should be a document's text, and where it was read (``file:line``)."""

    value: object
    where: str


class BadRow:
    """The value of a row that could not be read or decoded."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


COLUMN_HINT = "use --text_column"
"""How to choose another column in training. Evaluation replaces this text with its own."""

SHOWN_COLUMNS, SHOWN_NAME = 30, 60
CACHE_DIR_HINT = "give another directory with --cache_dir"
"""How to fix a cache directory that is full or cannot be written."""


def missing_column(column: str, where: object, columns: list[str]) -> ConfigError:
    """The error for an unknown column. Long names are cut: in a .csv without a header, they are documents."""
    known = ", ".join(one_line(name, SHOWN_NAME) for name in columns[:SHOWN_COLUMNS]) or "none"
    if len(columns) > SHOWN_COLUMNS:
        known += f" and {len(columns) - SHOWN_COLUMNS} more"
    return ConfigError(f"column {column!r} not in {where}; columns: {known}; {COLUMN_HINT}{nearest(column, columns)}")


@dataclass(frozen=True)
class SourceSpec:
    """The data set that the user named.

    ``option``: the flag with the name, for messages.
    """

    dataset_name: str
    text_column: str = "text"
    dataset_config: str | None = None
    dataset_split: str = "train"
    cache_dir: str | None = None
    streaming: bool = False
    dataset_revision: str | None = None
    option: str = field(default="--dataset_name", compare=False)

    @property
    def flag_and_value(self) -> str:
        """The flag that named the data set and its value, for messages."""
        return f"{self.option} {self.dataset_name}"


class Piece:
    """A part of a source. It pickles to a few hundred bytes; the process that reads it opens its files.

    ``expected_bytes``: estimated size of its text, for the progress bar.
    """

    expected_bytes: int = PIECE_BYTES

    def rows(self) -> Iterator[Row]:
        """Its rows in order. It can be called several times.

        Raises: ConfigError when the first record of a file does not have the column; DataError for a damaged file.
        """
        raise NotImplementedError


@contextmanager
def reading_data() -> Iterator[None]:
    """Raise DataError when a data file cannot be read. Other OSErrors are about the cache directory."""
    try:
        yield
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise DataError(f"the data{where} cannot be read: {error.strerror or error}") from error


def read_rows(piece: Piece) -> Iterator[Row]:
    """The rows of a piece. Raises: as ``Piece.rows``; DataError when a file cannot be read."""
    with reading_data():
        yield from piece.rows()


class Source:
    """The rows of a corpus in a fixed order, and a fingerprint that changes with its content."""

    def fingerprint(self) -> str:
        """Identity of the rows. The same data has the same fingerprint on every machine."""
        raise NotImplementedError

    def describe(self) -> dict[str, str]:
        """What the rows depend on, by name. Messages use it to explain a changed fingerprint."""
        return {"content": self.fingerprint()}

    def pieces(self) -> list[Piece]:
        """All rows as pieces, in order. The same data is always cut into the same pieces."""
        raise NotImplementedError

    def rows(self) -> Iterator[Row]:
        """The rows of all pieces, in order."""
        for piece in self.pieces():
            yield from read_rows(piece)


@dataclass(frozen=True)
class PieceGroup(Piece):
    """Consecutive small pieces as one piece: a folder of a million files becomes a few hundred pieces."""

    parts: tuple[Piece, ...]

    @property
    def expected_bytes(self) -> int:
        return sum(part.expected_bytes for part in self.parts)

    def rows(self) -> Iterator[Row]:
        for part in self.parts:
            yield from part.rows()


def group_pieces(parts: list[tuple[Piece, int]], max_bytes: int) -> list[Piece]:
    """Group consecutive ``(piece, bytes)`` pairs into pieces of at most ``max_bytes``. A larger piece stays alone."""
    pieces: list[Piece] = []
    group: list[Piece] = []
    size = 0
    for part, part_bytes in [*parts, (None, max_bytes)]:
        if group and size + part_bytes > max_bytes:
            pieces.append(group[0] if len(group) == 1 else PieceGroup(tuple(group)))
            group, size = [], 0
        group.append(part)
        size += part_bytes
    return pieces
