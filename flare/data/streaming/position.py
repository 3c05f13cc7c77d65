"""Where a stream is: the few numbers from which it goes on, and in what order it takes pieces. Pure.

The pieces of an epoch are permuted and dealt out to lanes, every ``num_lanes``-th one to a lane. Each lane is read
from its first piece to its last, segment by segment (what a worker tokenises at once), and the stream takes the
lanes' segments in turn. So lanes can be tokenised in parallel, and nothing in the order depends on who was faster.
"""

from dataclasses import asdict, dataclass, field

from flare.data.order import permutation
from flare.data.sources.documents import BadRows

MAX_LANES = 16
"""Pieces that are read in turn, so that neighbouring rows come from many places; also the most workers that help."""


@dataclass(frozen=True)
class Cursor:
    """A place in a lane: the lane's ``index``-th piece of this epoch, from row ``row`` of it."""

    index: int = 0
    row: int = 0


@dataclass(frozen=True)
class Place:
    """The beginning of a block: all that a stream must know to make this block and all later ones.

    Args:
        block: its number in the run. first_row: its first row's index in the run.
        epoch: the pass over the data that it belongs to. epoch_rows, epoch_tokens: given before it in this pass.
        cursors: of each lane, where its next unused segment begins; None when it is through in this pass.
        turn: the lane that is next, of whose segment ``skip`` tokens are used already.
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
        """As plain values; a few hundred bytes."""
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
