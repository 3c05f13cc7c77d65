"""A process that tokenises segments of pieces: ``python -m flare.data.streaming.worker FD PARENT``.

It is asked for one segment after the other and keeps the pieces open between. Told of a row that is not the next one
of an open piece, it opens the piece anew and reads up to there: what it answers depends on the question alone.
"""

import os
import signal
import sys
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection

import numpy as np

from flare.child_process import end_with_parent, ignore_stop_signals
from flare.data.sources.base import Row, read_rows
from flare.data.sources.documents import BadRows, text_hash, usable_texts
from flare.data.streaming.messages import Job, Segment
from flare.data.token_cache.encode import Encoder, batches
from flare.errors import FlareError

NICENESS = 10
"""Training's own processes go first where there are fewer cores than work."""


class OpenPiece:
    """A piece that is read by segments."""

    def __init__(self, job: Job, encoder: Encoder, number: int, row: int) -> None:
        self.encoder, self.held_out_below = encoder, job.held_out_below
        self.next_row = row
        self.bad = BadRows()
        rows = islice(read_rows(job.pieces[number]), row, job.limits[number])
        self.batches = batches(usable_texts(self._counted(rows), self.bad))

    def _counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self.next_row += 1
            yield row

    def segment(self) -> Segment:
        """The next one: a batch of documents, cut by the number of their characters."""
        first, before = self.next_row, self.bad.count
        batch = next(self.batches, None)
        texts = [text for text in batch or () if text_hash(text) >= self.held_out_below]
        documents = self.encoder.encode(texts) if texts else []
        starts = np.cumsum([0, *map(len, documents)])[:-1]
        tokens = np.concatenate(documents) if documents else np.empty(0, self.encoder.dtype)
        bad, self.bad.first = BadRows(self.bad.count - before, self.bad.first), []
        return Segment(tokens, starts, self.next_row, batch is None, self.next_row - first, bad)


def main() -> int:
    end_with_parent(signal.SIGKILL, int(sys.argv[2]))
    ignore_stop_signals()
    os.nice(NICENESS)
    pipe = Connection(int(sys.argv[1]))
    try:
        job: Job = pipe.recv()
        encoder = Encoder.from_message(job.encoder)
        open_pieces: dict[int, tuple[int, OpenPiece]] = {}
        while True:
            answer(pipe, job, encoder, open_pieces)
    except (EOFError, BrokenPipeError):  # no more work
        return 0


def answer(pipe: Connection, job: Job, encoder: Encoder, open_pieces: dict[int, tuple[int, OpenPiece]]) -> None:
    """Answer one question (lane, piece, row) with (lane, Segment) or (None, error)."""
    lane, number, row = pipe.recv()
    try:
        opened, piece = open_pieces.get(lane, (-1, None))
        if opened != number or piece.next_row != row:
            piece = OpenPiece(job, encoder, number, row)
            open_pieces[lane] = number, piece
        pipe.send((lane, piece.segment()))
    except BrokenPipeError:
        raise
    except FlareError as error:
        pipe.send((None, error))
    except Exception as error:  # whatever a reader raises must be shown by the run, not lost here
        pipe.send((None, FlareError(f"tokenising failed: {type(error).__name__}: {error}")))


if __name__ == "__main__":
    sys.exit(main())
