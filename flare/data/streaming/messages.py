"""What the processes of a stream tell each other. A module of its own: what is defined in the module that a process
runs cannot be unpickled by another one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flare.data.sources.base import Piece
from flare.data.sources.documents import BadRows
from flare.data.streaming.position import Place

WINDOW_BLOCKS = 3
"""Full blocks on disk at most, one that is being made among them: a step's rows may lie in three (the end of one, a
short one at the end of an epoch, the beginning of a third)."""


@dataclass(frozen=True)
class Segment:
    """Training documents of some rows of a piece, tokenised.

    Args:
        tokens: of all documents, each with its end-of-text token. starts: where each document begins in them.
        next_row: the first row of the piece behind it. ended: the piece holds no text behind it; tokens is empty.
        rows, bad: rows that it covers, and those without text.
    """

    tokens: np.ndarray
    starts: np.ndarray
    next_row: int
    ended: bool
    rows: int
    bad: BadRows


@dataclass(frozen=True)
class Job:
    """What all workers of a stream are told at first.

    Args:
        encoder: ``Encoder.to_message``. limits: of each piece, its most rows, None for all.
        held_out_below: documents whose hash is lower are for evaluation, and not tokenised here.
    """

    encoder: dict
    pieces: list[Piece]
    limits: list[int | None]
    held_out_below: int


@dataclass(frozen=True)
class Order:
    """What the first rank of a host asks for.

    Args:
        directory: of the blocks. dtype: of their tokens.
        block_rows: rows of a full block. step_rows: an epoch must have so many.
        total_rows: of the data in an epoch, where ``--dataset_size`` says how many.
    """

    job: Job
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
