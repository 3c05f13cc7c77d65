"""Loads micro-batches: a thread reads and packs the next step's rows while this step computes.

On GPUs the tensors are in pinned memory, so that they are copied to the GPU asynchronously.
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
    """Rows of an optimizer step: the row indices of all ranks, and this rank's micro-batches in host memory."""

    rows: np.ndarray
    num_targets: int  # of all ranks
    batches: list[dict[str, torch.Tensor]]


class StepLoader:
    """Micro-batches of one rank, step by step.

    Args:
        rows_by_rank: rows of a step for each rank, in rank order. micro: the most rows of a micro-batch.
        pin: the GPU for which tensors are pinned; None: ordinary memory.
        in_step: the same number of micro-batches on every rank, because a sharded model gathers its weights in each.
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
        # Only this thread reads data and order. Each thread has its own current GPU: with the default one every rank
        # would open a context on GPU 0. Source: torch/utils/data/_utils/pin_memory.py does the same.
        bind = {"initializer": torch.cuda.set_device, "initargs": (pin,)} if pin else {}
        self._thread = ThreadPoolExecutor(1, "prefetch", **bind)
        self._next: tuple[int, Future[StepRows]] | None = None

    def take(self, position: int) -> StepRows:
        """The step that begins at this position of the row order. The next step is prepared from now on."""
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
        micro_batches_of_rank = split_into_micro_batches(self.data, rows[self.mine], self.micro, self.counts)
        batches = [host_tensors(batch, self.pin) for batch in micro_batches_of_rank]
        return StepRows(rows, self.data.num_targets(rows), batches)


def split_into_micro_batches(
    data: TrainRows, rows: np.ndarray, micro: int, counts: list[int] | None
) -> Iterator[Batch]:
    """A rank's rows in micro-batches of at most ``micro`` rows.

    Args:
        counts: the number of rows of each rank, if every rank must have the same number of micro-batches. A rank that
            has no rows left gets a row without targets, which adds nothing to the loss.
    """
    for piece in equal_rounds(rows, counts, micro) if counts else micro_batches(rows, micro):
        batch = data.batch(piece if len(piece) else np.array([data.any_row()]))
        if not len(piece):
            batch.labels[:] = IGNORE_INDEX
        yield batch
