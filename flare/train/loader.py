"""The next step's rows are read and packed in a thread while this step computes, and the time spent waiting is kept.

On GPUs the tensors lie in pinned memory, so that their copies to the GPU need not be waited for.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from flare.data.order import equal_rounds, micro_batches
from flare.data.training_rows import IGNORE_INDEX, Batch, Positions, TrainRows
from flare.model.inputs import host_tensors


@dataclass(frozen=True)
class StepRows:
    """Rows of an optimizer step: which they are on all ranks, and this rank's micro-batches in host memory."""

    rows: np.ndarray
    num_targets: int  # of all ranks
    batches: list[dict[str, torch.Tensor]]


class StepLoader:
    """Micro-batches of one rank, step by step.

    Args:
        rows_by_rank: rows of a step for each rank, in rank order. micro: rows of a micro-batch, at most.
        pin: the GPU from which to get pinned memory for the tensors; None: plain memory.
        in_step: as many micro-batches on every rank (those of a sharded model gather its weights in each).
    """

    def __init__(
        self,
        data: TrainRows,
        order: Positions,
        rows_by_rank: Sequence[int],
        rank: int,
        micro: int,
        pin: torch.device | None = None,
        in_step: bool = False,
    ) -> None:
        self.data, self.order, self.micro, self.pin = data, order, micro, pin is not None
        self.counts = list(rows_by_rank) if in_step else None
        self.step_rows = sum(rows_by_rank)
        self.mine = slice(sum(rows_by_rank[:rank]), sum(rows_by_rank[: rank + 1]))
        self.wait_seconds = 0.0
        # Only this thread reads data and order. The current GPU is each thread's own: with the default one, each rank
        # could open a context on GPU 0. Source: torch/utils/data/_utils/pin_memory.py does the same.
        bind = {"initializer": torch.cuda.set_device, "initargs": (pin,)} if pin else {}
        self._thread = ThreadPoolExecutor(1, "prefetch", **bind)
        self._next: tuple[int, Future[StepRows]] | None = None

    def take(self, position: int) -> StepRows:
        """The step that begins at this position of the row order; begins to prepare the one after it."""
        first, future = self._next or (None, None)
        if first != position:
            future = self._thread.submit(self._prepare, position)
        t0 = time.perf_counter()
        step = future.result()
        self.wait_seconds += time.perf_counter() - t0
        following = position + self.step_rows
        self._next = (following, self._thread.submit(self._prepare, following))
        return step

    def take_wait(self) -> float:
        """Seconds that ``take`` waited since the last call."""
        seconds, self.wait_seconds = self.wait_seconds, 0.0
        return seconds

    def _prepare(self, position: int) -> StepRows:
        rows = self.order.rows(position, position + self.step_rows)
        batches = [host_tensors(b, self.pin) for b in cut(self.data, rows[self.mine], self.micro, self.counts)]
        return StepRows(rows, self.data.num_targets(rows), batches)


def cut(data: TrainRows, rows: np.ndarray, micro: int, counts: list[int] | None) -> Iterator[Batch]:
    """A rank's rows in micro-batches of at most ``micro``.

    Args:
        counts: the rows of each rank, where every rank must have as many micro-batches. One that has run out of rows
            gets some row without targets, which adds nothing to the loss.
    """
    for piece in equal_rounds(rows, counts, micro) if counts else micro_batches(rows, micro):
        batch = data.batch(piece if len(piece) else np.array([data.any_row()]))
        if not len(piece):
            batch.labels[:] = IGNORE_INDEX
        yield batch
