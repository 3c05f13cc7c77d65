"""The interface of training rows. Subclasses read them from a token cache, a mixture or a stream."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flare.distributed.process_group import World


@dataclass(frozen=True)
class Batch:
    """Arrays of int64 (B, T)."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray

    @property
    def num_tokens(self) -> int:
        return self.input_ids.size


class Positions(Protocol):
    """The rows at each position of a run; returned by ``TrainRows.order``."""

    def rows(self, first: int, last: int) -> np.ndarray:
        """Row indices at positions [first, last)."""


class TrainRows:
    """Training rows. The default methods are for rows that are completely on disk."""

    def start(self, world: World, recorded: dict | None, step_rows: int) -> None:
        """Prepare for reading. A collective. ``recorded``: the value of ``place_at`` in the checkpoint, if any."""

    def close(self) -> None:
        """Release resources; no row is read after this."""

    def place_at(self, position: int) -> dict | None:
        """What a checkpoint must record, in addition to the position, to resume there."""
        return None

    def order(self, seed: int) -> Positions:
        """The rows at each position of the run."""
        raise NotImplementedError

    def num_targets(self, rows: np.ndarray) -> int:
        """Targets in these rows, without reading them."""
        raise NotImplementedError

    def batch(self, rows: np.ndarray) -> Batch:
        """Inputs, labels and position ids of these rows."""
        raise NotImplementedError

    def any_row(self) -> int:
        """The index of a row that can be read now."""
        return 0

    def epochs(self, position: int) -> float:
        """Passes over the data up to a position."""
        raise NotImplementedError

    def passes(self, position: int) -> list[str]:
        """How often the data is read up to a position, for the log; empty if that is not known in advance."""
        return []

    def describe(self) -> str:
        """For the log."""
        raise NotImplementedError


IGNORE_INDEX = -100
"""Label of a position without a target, as in transformers and torch."""
