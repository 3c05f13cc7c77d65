"""Which rank reads which rows at which step: pure functions of seed, epoch and global row index.

The data of a run is an endless sequence of positions. Epoch e covers positions [e*N, (e+1)*N) with its own permutation
of all N rows. Step s of a run with global batch G reads positions [s*G, (s+1)*G). A position is therefore all that has
to be saved, and the data does not depend on the number of processes or on gradient accumulation.
"""

import numpy as np


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, a bijection of uint64. Source: Steele, Lea & Flood, OOPSLA 2014."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order of the rows in an epoch: rows sorted by a hash of (seed, epoch, row).

    Written here because random generators of libraries may change between versions.
    """
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(epoch))
        keys = _mix(_mix(np.arange(num_rows, dtype=np.uint64) + key) ^ key)
    return np.argsort(keys, kind="stable")


class RowOrder:
    """Rows at positions of the endless sequence; keeps the permutation of the epoch in use."""

    def __init__(self, seed: int, num_rows: int) -> None:
        self.seed = seed
        self.num_rows = num_rows
        self._epoch = -1
        self._rows = np.empty(0, dtype=np.int64)

    def rows(self, first: int, last: int) -> np.ndarray:
        """Row indices at positions [first, last)."""
        pieces = []
        while first < last:
            epoch, start = divmod(first, self.num_rows)
            stop = min(last - epoch * self.num_rows, self.num_rows)
            if epoch != self._epoch:
                self._epoch, self._rows = epoch, permutation(self.seed, epoch, self.num_rows)
            pieces.append(self._rows[start:stop])
            first = epoch * self.num_rows + stop
        return np.concatenate(pieces)


def portion(rows: np.ndarray, counts: list[int], rank: int) -> np.ndarray:
    """The contiguous part of ``rows`` for a rank, in proportion to ``counts``; may be empty."""
    bounds = np.rint(np.cumsum([0, *counts]) / sum(counts) * len(rows)).astype(int)
    return rows[bounds[rank] : bounds[rank + 1]]


def equal_rounds(rows: np.ndarray, counts: list[int], size: int) -> list[np.ndarray]:
    """Split the rows of a rank into as many pieces as the rank with the most rows needs; some may be empty.

    Ranks of a sharded model gather its weights in every micro-batch, so all must run the same number of them.
    """
    return np.array_split(rows, -(-max(counts) // size))


def micro_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Split the rows of a rank in one step into pieces of at most ``size``."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]
