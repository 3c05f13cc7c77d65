"""What every source of documents offers: rows in a fixed order, in pieces that worker processes read on their own.

What is usable text is decided in ``flare.data.sources.documents``; nothing here opens a file or tokenises.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flare.errors import ConfigError, DataError, nearest, one_line

PIECE_BYTES = 32 * 2**20
"""Input of a piece, where its format can be cut: a few seconds of tokenising, and a few hundred pieces in 10 GB."""
ENOUGH_PIECES = 64
"""A smaller corpus is cut into so many pieces: workers end nearly together when each does many."""
LEAST_PIECE_BYTES = 2**20
"""Below that, a piece's own files and messages would cost something."""


def piece_bytes(total_bytes: int) -> int:
    """Input of a piece, of a corpus or file of so many bytes."""
    return min(max(total_bytes // ENOUGH_PIECES, LEAST_PIECE_BYTES), PIECE_BYTES)


@dataclass(frozen=True)
class Row:
    """What a source holds where a document's text is expected, and where that is (``file:line``)."""

    value: object
    where: str


class BadRow:
    """The value of a row that could not even be read."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


COLUMN_HINT = "use --text_column"
"""How another column is named in training. Pieces do not know who reads them: evaluation says it in its own words."""

SHOWN_COLUMNS, SHOWN_NAME = 30, 60
OTHER_CACHE_DIR = "--cache_dir names another place"
"""What to do where the cache's disk is full or cannot be written."""


def missing_column(column: str, where: object, columns: list[str]) -> ConfigError:
    """The error of a column that a file or data set has not. The names in a .csv without a header are text."""
    known = ", ".join(one_line(name, SHOWN_NAME) for name in columns[:SHOWN_COLUMNS]) or "none"
    if len(columns) > SHOWN_COLUMNS:
        known += f" and {len(columns) - SHOWN_COLUMNS} more"
    return ConfigError(f"column {column!r} not in {where}; columns: {known}; {COLUMN_HINT}{nearest(column, columns)}")


@dataclass(frozen=True)
class SourceSpec:
    """What the user asked for.

    ``option``: where the name was given, for messages.
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
    def asked(self) -> str:
        """How the user named the set: the option and its value."""
        return f"{self.option} {self.dataset_name}"


class Piece:
    """A part of a source. It pickles to a few hundred bytes and opens what it reads in the process that reads it.

    ``expected_bytes``: text that it is likely to give, for the progress.
    """

    expected_bytes: int = PIECE_BYTES

    def rows(self) -> Iterator[Row]:
        """Its rows, in order; can be called again.

        Raises: ConfigError when the first record of a file has no such column; DataError for a damaged file.
        """
        raise NotImplementedError


@contextmanager
def reading_data() -> Iterator[None]:
    """A file of the data that cannot be read is a DataError; what is left of OSError is about the cache's disk."""
    try:
        yield
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise DataError(f"the data{where} cannot be read: {error.strerror or error}") from error


def read_rows(piece: Piece) -> Iterator[Row]:
    """The piece's rows. Raises: as ``Piece.rows``; DataError when a file cannot be read."""
    with reading_data():
        yield from piece.rows()


class Source:
    """Rows of a corpus, in a fixed order, and an identity that changes when its content does."""

    def fingerprint(self) -> str:
        """Identity of the rows: equal on every machine that has the same data."""
        raise NotImplementedError

    def describe(self) -> dict[str, str]:
        """What the rows are made of, part by part: by these a changed fingerprint is explained to people."""
        return {"content": self.fingerprint()}

    def pieces(self) -> list[Piece]:
        """All rows, cut into pieces in order. The same data gives the same pieces."""
        raise NotImplementedError

    def rows(self) -> Iterator[Row]:
        """The rows of all pieces, one after the other."""
        for piece in self.pieces():
            yield from read_rows(piece)


@dataclass(frozen=True)
class Several(Piece):
    """Small pieces that follow each other, read as one: a folder of a million files gives a few hundred."""

    parts: tuple[Piece, ...]

    @property
    def expected_bytes(self) -> int:
        return sum(part.expected_bytes for part in self.parts)

    def rows(self) -> Iterator[Row]:
        for part in self.parts:
            yield from part.rows()


def gather(parts: list[tuple[Piece, int]], most_bytes: int) -> list[Piece]:
    """Pieces of at most ``most_bytes`` where that is possible, from ``(piece, bytes)`` in order."""
    pieces: list[Piece] = []
    group: list[Piece] = []
    size = 0
    for part, part_bytes in [*parts, (None, most_bytes)]:
        if group and size + part_bytes > most_bytes:
            pieces.append(group[0] if len(group) == 1 else Several(tuple(group)))
            group, size = [], 0
        group.append(part)
        size += part_bytes
    return pieces
