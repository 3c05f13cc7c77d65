"""The next step's rows are read and packed in a thread while this step computes, and the time spent waiting is kept.

On cards the tensors lie in pinned memory, so that their copies to the card need not be waited for.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from flare.attention import document_bounds
from flare.data.order import RowOrder, equal_rounds, micro_batches, portion
from flare.data.packing import Batch, PackedRows
from flare.loss import IGNORE_INDEX


@dataclass(frozen=True)
class StepRows:
    """Rows of an optimizer step: which they are on all ranks, and this rank's micro-batches in host memory."""

    rows: np.ndarray
    num_targets: int  # of all ranks
    batches: list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Share:
    """A rank's part of any rows that all ranks go through together."""

    rows_by_rank: Sequence[int]  # of a step
    rank: int
    micro: int  # rows of a micro-batch, at most
    in_step: bool = False  # all ranks need as many micro-batches: those of a sharded model gather its weights in each

    def pieces(self, rows: np.ndarray) -> list[np.ndarray]:
        """This rank's micro-batches of ``rows``; some may be empty where ranks go in step."""
        parts = [portion(rows, self.rows_by_rank, rank) for rank in range(len(self.rows_by_rank))]
        mine = parts[self.rank]
        if self.in_step:
            return equal_rounds(mine, [len(part) for part in parts], self.micro)
        return micro_batches(mine, self.micro)


class StepLoader:
    """Micro-batches of one rank, step by step.

    Args:
        share: which rows of a step are this rank's, and how they are cut.
        pin: put the tensors into pinned memory.
    """

    def __init__(self, data: PackedRows, order: RowOrder, share: "Share", pin: bool = False) -> None:
        self.data, self.order, self.share, self.pin = data, order, share, pin
        self.step_rows = sum(share.rows_by_rank)
        self.wait_seconds = 0.0
        self._thread = ThreadPoolExecutor(1, "prefetch")  # only this thread reads data and order
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
        pieces = self.share.pieces(rows)
        batches = [host_tensors(batch_of(self.data, piece), self.pin) for piece in pieces]
        return StepRows(rows, self.data.num_targets(rows), batches)


def batch_of(data: PackedRows, rows: np.ndarray) -> Batch:
    """These rows; for none of them the first one, without a target: it adds nothing to the loss."""
    if len(rows):
        return data.batch(rows)
    batch = data.batch(np.arange(1))
    batch.labels[:] = IGNORE_INDEX
    return batch


def host_tensors(batch: Batch, pin: bool = False) -> dict[str, torch.Tensor]:
    """A batch as the arguments of the training model, in host memory; see ``TrainingModel.forward``."""
    arrays = {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "position_ids": batch.position_ids,
        "document_bounds": document_bounds(batch.position_ids),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin else tensors


def to_device(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The same on the device; a copy out of pinned memory is not waited for."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
