"""Messages between the processes of a stream.

They have a module of their own because another process cannot unpickle a class of the module ``__main__``.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flare.data.sources.base import Piece
from flare.data.sources.documents import BadRows
from flare.data.streaming.position import Place

MAX_FULL_BLOCKS = 3
"""Maximum number of full blocks on disk, including the one that is being written. The rows of a step can be in three
blocks: the end of one, a short one at the end of an epoch, the beginning of the third."""


@dataclass(frozen=True)
class Segment:
    """Training documents of some rows of a piece, tokenised.

    Args:
        tokens: of all documents, each with its end-of-text token. starts: where each document begins in them.
        next_row: the row of the piece that follows. ended: the piece has no more text; tokens is empty.
        rows, bad: number of rows read, and those without text.
    """

    tokens: np.ndarray
    starts: np.ndarray
    next_row: int
    ended: bool
    rows: int
    bad: BadRows


@dataclass(frozen=True)
class WorkerConfig:
    """The first message to each worker.

    Args:
        encoder: ``Encoder.to_message``. limits: maximum number of rows of each piece, None for all.
        held_out_below: documents whose hash is lower are for evaluation, and not tokenised here.
    """

    encoder: dict
    pieces: list[Piece]
    limits: list[int | None]
    held_out_below: int


@dataclass(frozen=True)
class ProducerConfig:
    """The first message to a producer, from the first rank of its host.

    Args:
        directory: of the blocks. dtype: of their tokens.
        block_rows: rows of a full block. step_rows: rows of an optimizer step; an epoch must have at least as many.
        total_rows: rows of the data in an epoch if ``--dataset_size`` is given, else None.
    """

    worker_config: WorkerConfig
    place: Place
    directory: Path
    dtype: np.dtype
    seed: int
    seq_len: int
    block_rows: int
    step_rows: int
    max_bad_rows: float
    total_rows: int | None
    num_workers: int
