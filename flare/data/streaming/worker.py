"""A process that tokenises segments of pieces: ``python -m flare.data.streaming.worker FD PARENT``.

It answers requests for segments, one at a time, and keeps the pieces open between requests. If the requested row is
not the next row of the open piece, it opens the piece again and skips to that row. So an answer depends only on its
request.
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
from flare.data.streaming.messages import Segment, WorkerConfig
from flare.data.token_cache.encode import Encoder, batches
from flare.errors import FlareError

NICENESS = 10
"""The training processes have priority if there are too few cores."""


class OpenPiece:
    """A piece that is read segment by segment."""

    def __init__(self, config: WorkerConfig, encoder: Encoder, number: int, row: int) -> None:
        self.encoder, self.held_out_below = encoder, config.held_out_below
        self.next_row = row
        self.bad = BadRows()
        rows = islice(read_rows(config.pieces[number]), row, config.limits[number])
        self.batches = batches(usable_texts(self._counted(rows), self.bad))

    def _counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self.next_row += 1
            yield row

    def segment(self) -> Segment:
        """The next segment: the next documents of about 2 million characters, tokenized."""
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
        config: WorkerConfig = pipe.recv()
        encoder = Encoder.from_message(config.encoder)
        open_pieces: dict[int, tuple[int, OpenPiece]] = {}
        while True:
            answer(pipe, config, encoder, open_pieces)
    except (EOFError, BrokenPipeError):  # no more work
        return 0


def answer(
    pipe: Connection, config: WorkerConfig, encoder: Encoder, open_pieces: dict[int, tuple[int, OpenPiece]]
) -> None:
    """Answer one request (lane, piece, row) with (lane, Segment) or (None, error)."""
    lane, number, row = pipe.recv()
    try:
        opened, piece = open_pieces.get(lane, (-1, None))
        if opened != number or piece.next_row != row:
            piece = OpenPiece(config, encoder, number, row)
            open_pieces[lane] = number, piece
        pipe.send((lane, piece.segment()))
    except BrokenPipeError:
        raise
    except FlareError as error:
        pipe.send((None, error))
    except Exception as error:  # the run must show every error of a reader
        pipe.send((None, FlareError(f"tokenising failed: {type(error).__name__}: {error}")))


if __name__ == "__main__":
    sys.exit(main())
