"""Streamed rows of small corpora, and the processes behind them, for the tests of streaming."""

import time
from pathlib import Path

import numpy as np
import torch

from flare.data.sources.base import SourceSpec
from flare.data.sources.open import open_source
from flare.data.streaming.held_out import StreamedCorpus, open_streamed
from flare.data.streaming.rows import StreamedRows, StreamSettings
from flare.data.token_cache.cache import TokenSettings
from flare.distributed.process_group import World
from flare.nope.load import load_tokenizer
from tests.data.test_token_cache import is_alive

ALONE = World(0, 0, 1, torch.device("cpu"))
BLOCK_ROWS, STEP_ROWS = 60, 12
SEQ_LEN = 32


def stream_of(path: Path, base: Path, cache_dir: Path, **settings: object) -> StreamedCorpus:
    source = open_source(SourceSpec(str(path), streaming=True), cache_dir)
    return open_streamed(source, load_tokenizer(base), cache_dir, TokenSettings(**settings), 10)


def rows_of(corpus: StreamedCorpus, cache_dir: Path, **changes: object) -> StreamedRows:
    facts = {
        "seq_len": SEQ_LEN, "packing": "document", "seed": 3, "block_rows": BLOCK_ROWS, "cache_dir": cache_dir,
        "num_workers": 2,
    }  # fmt: skip
    return StreamedRows(corpus, StreamSettings(**facts | changes))


def read(rows: StreamedRows, first: int, last: int, step: int) -> list[np.ndarray]:
    """Input ids of each step."""
    found = []
    for position in range(first, last, step):
        batch = rows.batch(chosen := rows.rows(position, position + step))
        assert rows.num_targets(chosen) == (batch.labels >= 0).sum()
        found.append(batch.input_ids)
    return found


# -- the same rows as without streaming -------------------------------------------------------------------------


def size_of(file: Path) -> int:
    """0 for a file that has just gone."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def wait_for_end(pids: list[str]) -> None:
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)
