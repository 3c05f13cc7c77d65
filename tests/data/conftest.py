"""Fixtures of the data tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flare.data.streaming.rows import StreamedRows
from tests.conftest import write_corpus
from tests.data.streams import ALONE, STEP_ROWS, rows_of, stream_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of 16 KiB and more."""
    directory = tmp_path_factory.mktemp("folder")
    for number in range(4):
        write_corpus(directory / f"{number}.jsonl", 50, seed=number)
    return directory


@pytest.fixture
def started(folder: Path, base: Path, tmp_path: Path) -> Iterator[StreamedRows]:
    rows = rows_of(stream_of(folder, base, tmp_path), tmp_path)
    rows.start(ALONE, None, STEP_ROWS)
    yield rows
    rows.close()
