"""A weighted mixture of data sets: which set a position of the run reads from, and which row of it.

With weights, each block of positions has a fixed number of places for each set. They are spread evenly, so every block
and nearly every step has the sets in the right proportion. Each set has its own row order, epoch after epoch. The
number of its rows before a position is computed directly.
"""

from collections.abc import Iterator
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from flare.data.order import RowOrder
from flare.data.packing import PackedRows
from flare.data.training_rows import Batch, TrainRows
from flare.errors import ConfigError

MAX_BLOCK_ROWS = 10_000
"""Maximum length of a block, after which the pattern repeats. Weights that need more are rounded to 1/10,000."""


def block_counts(weights: list[float]) -> list[int]:
    """Places of each set in a block: the smallest integers in proportion to the weights, rounded for long blocks.

    Raises: ConfigError for a weight that rounds to zero places.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * scale) for weight in exact]
    counts = [count // gcd(*counts) for count in counts]
    if sum(counts) <= MAX_BLOCK_ROWS:
        return counts
    shares = [weight * MAX_BLOCK_ROWS / sum(exact) for weight in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: (counts[k] - shares[k], k))
    for k in by_remainder[: MAX_BLOCK_ROWS - sum(counts)]:
        counts[k] += 1
    if 0 in counts:
        small = weights[counts.index(0)]
        raise ConfigError(f"--dataset_weights {small:g} is less than 1/{MAX_BLOCK_ROWS} of all; leave that set out")
    return counts


def check_weights(weights: list[float], names: list[str]) -> None:
    """Raises: ConfigError if there is not one weight per data set, and as ``block_counts``."""
    if len(weights) != len(names) or len(names) == 1:
        raise ConfigError(
            f"--dataset_weights has {len(weights)} weights for {len(names)} data sets ({', '.join(names)}); "
            "give one for each data set"
        )
    block_counts(weights)


def interleave(counts: list[int]) -> np.ndarray:
    """The set at each of ``sum(counts)`` places. Place j of the counts[k] places of set k is at (j + 1/2) / counts[k].

    In the first p places, each set differs from its share of p by at most half the number of sets.
    """
    sets = np.repeat(np.arange(len(counts)), counts)
    ways = np.concatenate([(2 * np.arange(count) + 1) / (2 * count) for count in counts if count])
    return sets[np.argsort(ways, kind="stable")]


class Turns:
    """The data set at each position of the endless sequence. ``counts``: places of each set in a block."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = np.array(counts)
        self.block = sum(counts)
        self.sets = interleave(counts)
        taken = np.cumsum(self.sets[:, None] == np.arange(len(counts)), axis=0)
        self.before = np.concatenate([np.zeros((1, len(counts)), dtype=np.int64), taken])

    def taken(self, position: int) -> np.ndarray:
        """Number of rows of each set before a position, over all epochs."""
        blocks, place = divmod(position, self.block)
        return blocks * self.counts + self.before[place]

    def between(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray, int, int]]:
        """Split positions [first, last) by set: (set, places, own positions [begin, end)) for each set with any."""
        sets = self.sets[np.arange(first, last) % self.block]
        for k, (begin, end) in enumerate(zip(self.taken(first), self.taken(last), strict=True)):
            if end > begin:
                yield k, np.flatnonzero(sets == k), int(begin), int(end)


def seed_of(seed: int, k: int) -> int:
    """A different seed for each set, or two sets of one size would have the same order. Seeds are below 2**32."""
    return seed + (k << 32)


class MixedOrder(Turns):
    """Rows at positions of the endless sequence, by weights. Row indices count through all sets.

    Args:
        sizes: rows of each set. counts: places of each set in a block.
    """

    def __init__(self, seed: int, sizes: list[int], counts: list[int]) -> None:
        super().__init__(counts)
        self.first = np.cumsum([0, *sizes])
        self.orders = [RowOrder(seed_of(seed, k), size) for k, size in enumerate(sizes)]

    def rows(self, first: int, last: int) -> np.ndarray:
        """Row indices at positions [first, last)."""
        rows = np.empty(last - first, dtype=np.int64)
        for k, places, begin, end in self.between(first, last):
            rows[places] = self.first[k] + self.orders[k].rows(begin, end)
        return rows


class MixedRows(TrainRows):
    """The rows of several data sets. Row indices count through the sets, one after the other.

    Args:
        parts: rows of each set, in the order of ``names``.
        counts: places of each set in a block; None reads every row once per epoch.
        spread: number the rows so that the first n rows hold all sets in proportion, for any n (for evaluation).
    """

    def __init__(
        self, names: list[str], parts: list[PackedRows], counts: list[int] | None = None, spread: bool = False
    ) -> None:
        self.names = names
        self.parts = parts
        self.counts = counts
        self.sizes = [len(part) for part in parts]
        self.first = np.cumsum([0, *self.sizes])
        self.num_rows = int(self.first[-1])
        self.num_documents = sum(part.num_documents for part in parts)
        self.num_tokens = sum(part.num_tokens for part in parts)
        self.index: np.ndarray | None = None
        if spread:
            self.index = np.argsort(np.argsort(interleave(self.sizes), kind="stable"), kind="stable")

    def __len__(self) -> int:
        return self.num_rows

    def order(self, seed: int) -> RowOrder | MixedOrder:
        """The rows at each position of the run."""
        if self.counts is None:
            return RowOrder(seed, self.num_rows)
        return MixedOrder(seed, self.sizes, self.counts)

    def epochs(self, position: int) -> float:
        """Passes up to a position; one is as many rows as all sets have together, whatever the weights."""
        return position / self.num_rows

    def describe(self) -> str:
        """For the log."""
        return f"{self.num_documents:,} documents, {self.num_tokens:,} tokens, {self.num_rows:,} rows"

    def passes(self, position: int) -> list[str]:
        """How often each set is read up to a position, for the log."""
        if self.counts is None:
            taken = [position * size / self.num_rows for size in self.sizes]
        else:
            taken = MixedOrder(0, self.sizes, self.counts).taken(position)
        return [
            f"data set {name}: {size:,} rows, {rows / position:.1%} of the run, {rows / size:.2f} epochs"
            for name, size, rows in zip(self.names, self.sizes, taken, strict=True)
        ]

    def num_targets(self, rows: np.ndarray) -> int:
        """Targets in these rows, without reading them."""
        return sum(self.parts[k].num_targets(inside) for k, _, inside in self._by_set(rows))

    def batch(self, rows: np.ndarray) -> Batch:
        """Inputs, labels and position ids of these rows."""
        arrays = [np.empty((len(rows), self.parts[0].seq_len), dtype=np.int64) for _ in range(3)]
        for k, places, inside in self._by_set(rows):
            batch = self.parts[k].batch(inside)
            for array, content in zip(arrays, (batch.input_ids, batch.labels, batch.position_ids), strict=True):
                array[places] = content
        return Batch(*arrays)

    def _by_set(self, rows: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(set, places in ``rows``, rows of the set) for each set with any of them."""
        rows = np.asarray(rows, dtype=np.int64)
        if self.index is not None:
            rows = self.index[rows]
        sets = np.searchsorted(self.first, rows, "right") - 1
        return [(int(k), np.flatnonzero(sets == k), rows[sets == k] - self.first[k]) for k in np.unique(sets)]
