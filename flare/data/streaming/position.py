"""The place of a stream: the few numbers from which it resumes, and the order of pieces. Pure functions and values.

The pieces of an epoch are permuted and distributed to n lanes: lane k has every n-th piece, from piece k on. A
lane is read from its first piece to its last, segment by segment. The stream takes one segment of each lane in turn.
So lanes can be tokenised in parallel, and the order does not depend on which worker is faster.
"""

from dataclasses import asdict, dataclass, field

from flare.data.order import permutation
from flare.data.sources.documents import BadRows

MAX_LANES = 16
"""Pieces that are read in turn, so that neighbouring rows come from many pieces. More workers do not help."""


@dataclass(frozen=True)
class Cursor:
    """A place in a lane: row ``row`` of the ``index``-th piece of the lane in this epoch."""

    index: int = 0
    row: int = 0


@dataclass(frozen=True)
class Place:
    """The beginning of a block: what a stream needs to make this block and all later ones.

    Args:
        block: its number in the run. first_row: its first row's index in the run.
        epoch: the pass over the data that the block belongs to. epoch_rows, epoch_tokens: made before it in this pass.
        cursors: where the next unused segment of each lane begins; None if the lane has ended in this pass.
        turn: the next lane. The first ``skip`` tokens of its segment are already used.
        rows_read, bad: rows of the data used before it in this pass, and those without text.
    """

    cursors: tuple[Cursor | None, ...]
    block: int = 0
    first_row: int = 0
    epoch: int = 0
    epoch_rows: int = 0
    epoch_tokens: int = 0
    turn: int = 0
    skip: int = 0
    rows_read: int = 0
    bad_rows: int = 0
    first_bad_rows: tuple[str, ...] = field(default=())

    @classmethod
    def start(cls, num_pieces: int) -> "Place":
        """The beginning of the run."""
        return cls((Cursor(),) * min(num_pieces, MAX_LANES))

    @classmethod
    def from_json(cls, content: dict) -> "Place":
        """What ``to_json`` wrote."""
        cursors = tuple(cursor and Cursor(*cursor) for cursor in content["cursors"])
        return cls(**content | {"cursors": cursors, "first_bad_rows": tuple(content["first_bad_rows"])})

    def to_json(self) -> dict:
        """Plain values for JSON, a few hundred bytes."""
        cursors = [cursor and [cursor.index, cursor.row] for cursor in self.cursors]
        return asdict(self) | {"cursors": cursors, "first_bad_rows": list(self.first_bad_rows)}

    @property
    def bad(self) -> BadRows:
        return BadRows(self.bad_rows, list(self.first_bad_rows))

    def epochs(self, num_pieces: int) -> float:
        """Passes over the data up to here, counted by whole pieces."""
        lanes = len(self.cursors)
        sizes = [len(range(lane, num_pieces, lanes)) for lane in range(lanes)]
        done = sum(size if cursor is None else cursor.index for cursor, size in zip(self.cursors, sizes, strict=True))
        return self.epoch + done / num_pieces


def lane_pieces(seed: int, epoch: int, num_pieces: int, lane: int) -> list[int]:
    """The pieces of a lane in an epoch, in the order in which it reads them."""
    return permutation(seed, epoch, num_pieces)[lane :: min(num_pieces, MAX_LANES)].tolist()
