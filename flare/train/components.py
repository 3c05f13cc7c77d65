"""The components and callbacks of a trainer, and its evaluation of the held-out rows."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from flare.config.options import Options
from flare.data.order import portion
from flare.data.packing import PackedRows
from flare.data.training_rows import TrainRows
from flare.distributed import process_group
from flare.distributed.fsdp import is_sharded
from flare.distributed.process_group import World
from flare.errors import FlareError
from flare.model.inputs import host_tensors, to_device
from flare.model.training_model import TrainingModel
from flare.train.loader import split_into_micro_batches
from flare.train.metrics import MetricsWriter
from flare.train.train_state import TrainState


@dataclass(frozen=True)
class Components:
    """What a trainer works with."""

    model: TrainingModel
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    train_rows: TrainRows
    eval_rows: PackedRows
    max_steps: int
    global_batch_size: int
    rows_by_rank: Sequence[int] | None = None  # of a step, their sum is the global batch; None: equal
    model_flops_per_token: float | None = None
    executed_flops_per_token: float | None = None
    peak_flops: float | None = None  # of all GPUs together, per second


@dataclass(frozen=True)
class Callbacks:
    """What a trainer calls while it runs."""

    save: Callable[[TrainState], None] = lambda train_state: None
    """Writes a checkpoint. Called on every rank."""
    metrics: MetricsWriter | None = None
    """On rank 0 only."""
    watch_step: Callable[[int], AbstractContextManager] = nullcontext
    """The watchdog: a context manager around the step with this number."""
    write_bad_rows: Callable[[int, np.ndarray], None] = lambda step, rows: None
    """Called with a step and its row indices when the loss or the gradient norm is not finite."""
    evaluate_more: Callable[[int, Callable[[], float]], dict] | None = None
    """What an evaluation records besides the loss, given the step and a function that computes the loss. Called on
    every rank."""


def evaluate_rows(
    components: Components, options: Options, world: World, rows_by_rank: Sequence[int]
) -> tuple[float, float]:
    """(mean NLL in nats, share of targets that are the argmax) of the held-out rows. A collective."""
    model, held_out = components.model, components.eval_rows
    rows = np.arange(len(held_out))[: options.max_eval_samples]
    portions = [portion(rows, rows_by_rank, rank) for rank in range(world.size)]
    counts = [len(rows_of_rank) for rows_of_rank in portions] if is_sharded(model) else None
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # NLLs, hits, targets
    model.eval()
    micro = options.per_device_train_batch_size
    for batch in split_into_micro_batches(held_out, portions[world.rank], micro, counts):
        tensors = to_device(host_tensors(batch), world.device)
        losses, correct = model.score(**tensors)
        sums += torch.stack([losses.double().sum(), correct.sum().double(), (tensors["labels"] >= 0).sum().double()])
    loss_sum, hits, targets = process_group.all_reduce_sum(sums).tolist()
    if not math.isfinite(loss_sum):
        raise FlareError("the evaluation loss is not finite; the last checkpoint is good")
    return loss_sum / targets, hits / targets
