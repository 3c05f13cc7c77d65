"""Reads data sets saved with ``save_to_disk`` of ``datasets``: a ``Dataset`` or a ``DatasetDict``."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flare.data.sources.base import Piece, Row, SourceSpec, missing_column, piece_bytes
from flare.data.sources.file_formats import values_of
from flare.data.sources.files import HashedFiles
from flare.errors import ConfigError, DataError, first_line, nearest

BATCH_ROWS = 1000
STATE, SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class TableSlice(Piece):
    """Rows [begin, end) of a memory-mapped ``datasets.Dataset``. Only file paths are pickled."""

    dataset: Any
    column: str
    name: str
    begin: int
    end: int

    def rows(self) -> Iterator[Row]:
        tables = self.dataset.with_format("arrow")
        for first in range(self.begin, self.end, BATCH_ROWS):
            table = tables[first : min(first + BATCH_ROWS, self.end)]
            for number, value in enumerate(values_of(table.column(self.column)), first):
                yield Row(value, f"{self.name}[{number}]")


def table_slices(dataset: Any, column: str, name: str) -> list[Piece]:
    """All rows of a ``datasets.Dataset``, in pieces of about ``piece_bytes``."""
    dataset = dataset.select_columns([column])
    rows = len(dataset)
    size = max(dataset.data.nbytes, 1)
    step = max(1, piece_bytes(size) * rows // size)
    return [TableSlice(dataset, column, name, begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote this directory."""
    return (path / SPLITS).is_file() or ((path / STATE).is_file() and (path / "dataset_info.json").is_file())


class SavedSource(HashedFiles):
    """A saved ``Dataset``, or the split ``--dataset_split`` of a saved ``DatasetDict``.

    The fingerprint is a hash of its Arrow files. The fingerprint of ``datasets`` is not used, because it depends on
    how the data set was made.
    """

    def __init__(self, path: Path, spec: SourceSpec, memo_dir: Path | None = None) -> None:
        from datasets import load_from_disk

        path = choose_split(path, spec.dataset_split)
        try:
            files = [path / file["filename"] for file in read_json(path / STATE)["_data_files"]]
            if not files:  # ``datasets`` can write such a data set but not read it
                raise DataError(f"{path} is a data set without rows")
            self.dataset = load_from_disk(str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = first_line(error)
            raise DataError(f"{path} is not a complete data set of save_to_disk ({reason})") from error
        if spec.text_column not in self.dataset.column_names:
            raise missing_column(spec.text_column, path, self.dataset.column_names)
        super().__init__(files, spec.text_column, path, memo_dir)

    def pieces(self) -> list[Piece]:
        return table_slices(self.dataset, self.text_column, str(self.root))


def choose_split(path: Path, split: str) -> Path:
    """The directory of a split. A data set without splits has only ``train``.

    Raises: ConfigError for an unknown split.
    """
    if not (path / SPLITS).is_file():
        if split != "train":
            raise ConfigError(
                f"--dataset_split {split}: {path} is a single data set without splits; leave out --dataset_split"
            )
        return path
    splits = read_json(path / SPLITS).get("splits", [])
    if split not in splits:
        raise ConfigError(
            f"--dataset_split {split}: {path} has the splits {', '.join(splits)}{nearest(split, splits)}"
        )
    return path / split


def read_json(file: Path) -> dict:
    """Read a JSON file. Raises: DataError when it cannot be read or is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
