"""The lanes of a stream as the producer sees them: what is asked of workers next, and what they have answered."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from flare.data.sources.documents import BadRows
from flare.data.streaming.messages import Segment
from flare.data.streaming.position import Cursor, Place, lane_pieces

QUEUED_SEGMENTS = 2
"""Segments that a lane has ready at most, some 2 MB each."""


@dataclass(frozen=True)
class Item:
    """What a lane gives next: a segment, or (``tokens`` None) the news that it is through in this epoch.

    ``end``: where the lane's next item begins. ``rows``, ``bad``: rows of the data since the item before.
    """

    tokens: np.ndarray | None
    starts: np.ndarray
    end: Cursor | None
    rows: int
    bad: BadRows


class Lane:
    """One lane: it runs ahead over pieces and epochs as far as its queue has room."""

    def __init__(self, number: int, seed: int, num_pieces: int, place: Place) -> None:
        self.number, self.seed, self.num_pieces = number, seed, num_pieces
        self.used = place.cursors[number]
        self.queue: deque[Item] = deque()
        self.is_asked = False
        self.epoch = place.epoch + (self.used is None)
        self.next = self.used or Cursor()
        self.pieces = lane_pieces(seed, self.epoch, num_pieces, number)
        self._forget()

    def _forget(self) -> None:
        self.rows, self.bad = 0, BadRows()

    @property
    def wants_more(self) -> bool:
        return not self.is_asked and len(self.queue) < QUEUED_SEGMENTS

    def question(self) -> tuple[int, int, int]:
        """(lane, piece, row) of the next segment."""
        self.is_asked = True
        return self.number, self.pieces[self.next.index], self.next.row

    def answered(self, segment: Segment) -> None:
        """Queue a segment; at the end of a piece go on to the next one, and at the last one's to the next epoch."""
        self.is_asked = False
        self.rows += segment.rows
        self.bad.extend(segment.bad)
        if not segment.ended:
            self.next = Cursor(self.next.index, segment.next_row)
            self._put(segment.tokens, segment.starts, self.next)
        elif self.next.index + 1 < len(self.pieces):
            self.next = Cursor(self.next.index + 1, 0)
        else:
            self._put(None, segment.starts, None)
            self.epoch, self.next = self.epoch + 1, Cursor()
            self.pieces = lane_pieces(self.seed, self.epoch, self.num_pieces, self.number)

    def _put(self, tokens: np.ndarray | None, starts: np.ndarray, end: Cursor | None) -> None:
        self.queue.append(Item(tokens, starts, end, self.rows, self.bad))
        self._forget()
