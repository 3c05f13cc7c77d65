"""The lanes of a stream in the producer: which segment to request next, and the queue of received segments."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from flare.data.sources.documents import BadRows
from flare.data.streaming.messages import Segment
from flare.data.streaming.position import Cursor, Place, lane_pieces

MAX_QUEUED_SEGMENTS = 2
"""Maximum number of segments in the queue of a lane, about 2 MB each."""


@dataclass(frozen=True)
class LaneItem:
    """An entry of a lane's queue: a segment, or the end of the lane in this epoch (``tokens`` is None).

    ``end``: where the next item of the lane begins. ``rows``, ``bad``: rows of the data since the previous item.
    """

    tokens: np.ndarray | None
    starts: np.ndarray
    end: Cursor | None
    rows: int
    bad: BadRows


class Lane:
    """One lane. It continues over pieces and epochs until its queue is full."""

    def __init__(self, number: int, seed: int, num_pieces: int, place: Place) -> None:
        self.number, self.seed, self.num_pieces = number, seed, num_pieces
        self.used = place.cursors[number]
        self.queue: deque[LaneItem] = deque()
        self.is_waiting = False
        self.epoch = place.epoch + (self.used is None)
        self.next = self.used or Cursor()
        self.pieces = lane_pieces(seed, self.epoch, num_pieces, number)
        self._reset_counts()

    def _reset_counts(self) -> None:
        self.rows, self.bad = 0, BadRows()

    @property
    def needs_request(self) -> bool:
        return not self.is_waiting and len(self.queue) < MAX_QUEUED_SEGMENTS

    def next_request(self) -> tuple[int, int, int]:
        """(lane, piece, row) of the next segment."""
        self.is_waiting = True
        return self.number, self.pieces[self.next.index], self.next.row

    def receive_segment(self, segment: Segment) -> None:
        """Enqueue a segment. After the last segment of a piece the next piece follows, then the next epoch."""
        self.is_waiting = False
        self.rows += segment.rows
        self.bad.extend(segment.bad)
        if not segment.ended:
            self.next = Cursor(self.next.index, segment.next_row)
            self._enqueue(segment.tokens, segment.starts, self.next)
        elif self.next.index + 1 < len(self.pieces):
            self.next = Cursor(self.next.index + 1, 0)
        else:
            self._enqueue(None, segment.starts, None)
            self.epoch, self.next = self.epoch + 1, Cursor()
            self.pieces = lane_pieces(self.seed, self.epoch, self.num_pieces, self.number)

    def _enqueue(self, tokens: np.ndarray | None, starts: np.ndarray, end: Cursor | None) -> None:
        self.queue.append(LaneItem(tokens, starts, end, self.rows, self.bad))
        self._reset_counts()
