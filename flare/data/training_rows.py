"""What a trainer asks of its rows. Where they come from is the business of the classes below this one."""

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
    """Which rows lie at which positions of a run: what ``TrainRows.order`` gives."""

    def rows(self, first: int, last: int) -> np.ndarray:
        """Row indices at positions [first, last)."""


class TrainRows:
    """Training rows. The defaults are those of rows that lie on disk whole."""

    def start(self, world: World, recorded: dict | None, step_rows: int) -> None:
        """Get ready to be read. A collective. ``recorded``: what ``place_at`` gave for the position to go on from."""

    def close(self) -> None:
        """No row will be read any more."""

    def place_at(self, position: int) -> dict | None:
        """What, besides the position, a checkpoint must record to go on from there."""
        return None

    def order(self, seed: int) -> Positions:
        """Which rows lie at which positions of the run."""
        raise NotImplementedError

    def num_targets(self, rows: np.ndarray) -> int:
        """Targets in these rows, without reading them."""
        raise NotImplementedError

    def batch(self, rows: np.ndarray) -> Batch:
        """Inputs, labels and position ids of these rows."""
        raise NotImplementedError

    def any_row(self) -> int:
        """The index of a row that can be read at the moment."""
        return 0

    def epochs(self, position: int) -> float:
        """Passes over the data up to a position."""
        raise NotImplementedError

    def passes(self, position: int) -> list[str]:
        """How often the data is read up to a position, for the log; nothing where that is not known before."""
        return []

    def describe(self) -> str:
        """For the log."""
        raise NotImplementedError


IGNORE_INDEX = -100
"""Label of a position without a target, as in transformers and torch."""
