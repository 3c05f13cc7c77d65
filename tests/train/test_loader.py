"""Rows loaded ahead of time: the right ones, errors in the right step, and the measured wait."""

import gc
import threading
import time

import numpy as np
import pytest
import torch

from flare.data.order import RowOrder
from flare.data.packing import Batch
from flare.model.inputs import host_tensors
from flare.train.garbage_collection import COLLECT_STEPS, collect_at_intervals
from flare.train.loader import StepLoader

LENGTH = 8


class Rows:
    """Rows whose tokens are their index; one may fail to be read. ``read`` counts micro-batches."""

    def __init__(self, count: int, bad: int | None = None) -> None:
        self.count, self.bad = count, bad
        self.read = threading.Semaphore(0)

    def __len__(self) -> int:
        return self.count

    def num_targets(self, rows: np.ndarray) -> int:
        return len(rows) * LENGTH

    def batch(self, rows: np.ndarray) -> Batch:
        if self.bad in rows:
            raise OSError(f"row {self.bad} cannot be read")
        self.read.release()
        ids = np.repeat(np.asarray(rows)[:, None], LENGTH, 1)
        return Batch(ids, ids + 1, np.tile(np.arange(LENGTH), (len(rows), 1)))


def loader(rows: Rows, counts: tuple[int, ...] = (3, 1), rank: int = 0) -> StepLoader:
    return StepLoader(rows, RowOrder(0, len(rows)), counts, rank, micro=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_steps_are_those_of_the_order_in_any_sequence(rank: int) -> None:
    """Also after a jump, as at resume: rows prepared for another position are not used."""
    rows, order = Rows(10), RowOrder(0, 10)
    steps = loader(rows, rank=rank)
    for position in (0, 4, 8, 0, 20):
        expected = order.rows(position, position + 4)
        step = steps.take(position)
        assert step.rows.tolist() == expected.tolist()
        assert step.num_targets == 4 * LENGTH
        mine = [row for batch in step.batches for row in batch["input_ids"][:, 0].tolist()]
        assert mine == (expected[:3] if rank == 0 else expected[3:]).tolist()
        assert [len(batch["labels"]) for batch in step.batches] == ([2, 1] if rank == 0 else [1])


def test_a_row_that_cannot_be_read_raises_in_its_own_step() -> None:
    order = RowOrder(0, 12).rows(0, 12)
    steps = loader(Rows(12, bad=int(order[5])))
    steps.take(0)
    with pytest.raises(OSError, match="cannot be read"):
        steps.take(4)


def test_wait_is_summed_until_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.5, 10.0, 10.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    steps = loader(Rows(12))
    for position in (0, 4):
        steps.take(position)
    assert steps.take_wait() == 0.75
    assert steps.take_wait() == 0.0


def test_the_next_step_is_prepared_ahead() -> None:
    rows = Rows(12)
    steps = loader(rows)
    steps.take(0)
    assert rows.read.acquire(timeout=30)  # step 1: two micro-batches
    assert rows.read.acquire(timeout=30)
    assert rows.read.acquire(timeout=30)  # and the next step's, which nobody has taken
    assert rows.read.acquire(timeout=30)


def test_memory_is_pinned_by_a_thread_bound_to_the_ranks_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda and pinning are recorded, not run. Each thread has its own current GPU; here it must not be GPU 0."""
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: calls.append((threading.current_thread().name, gpu)))
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda self: calls.append(("pinned", self.is_contiguous())) or self
    )
    gpu = torch.device("cuda", 1)
    StepLoader(Rows(4), RowOrder(0, 4), (3, 1), 1, micro=2, pin=gpu).take(0)
    assert calls[0] == ("prefetch_0", gpu)
    assert len(calls) > 1
    assert set(calls[1:]) == {("pinned", True)}


def test_tensors_are_the_models_arguments() -> None:
    tensors = host_tensors(Rows(4).batch(np.array([2, 3])))
    assert tensors["document_bounds"].tolist() == [0, 8, 16]
    assert tensors["document_bounds"].dtype == torch.int32
    assert {tensors[name].dtype for name in ("input_ids", "labels", "position_ids")} == {torch.int64}


def test_garbage_is_collected_at_intervals_and_the_collector_is_restored() -> None:
    collections: list[int] = []
    gc.callbacks.append(lambda phase, info: collections.append(info["generation"]) if phase == "stop" else None)
    try:
        with collect_at_intervals() as after_step:
            after_step()
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 0
            collections.clear()
            for _ in range(2 * COLLECT_STEPS):
                after_step()
            assert collections == [1, 1]
        assert gc.isenabled()
        assert gc.get_freeze_count() == 0
    finally:
        gc.callbacks.pop()
