"""What a trainer is made of, and how its held-out rows are scored."""

import math
from collections.abc import Callable, Sequence
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
from flare.train.loader import cut


@dataclass
class Parts:
    """What a trainer is made of."""

    model: TrainingModel
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    train_rows: TrainRows
    eval_rows: PackedRows
    max_steps: int
    global_batch_size: int
    rows_by_rank: Sequence[int] | None = None  # of a step, summing to the global batch; None: equal
    model_flops_per_token: float | None = None
    executed_flops_per_token: float | None = None
    peak_flops: float | None = None  # of all GPUs together, per second
    more_evaluation: Callable[[int, Callable[[], float]], dict] | None = None
    """What an evaluation records besides the loss, given the step and the way to get the loss. A collective."""


def evaluate_rows(parts: Parts, options: Options, world: World, rows_by_rank: Sequence[int]) -> tuple[float, float]:
    """(mean NLL in nats, share of targets that are the argmax) over the held-out rows, by all ranks together."""
    rows = np.arange(len(parts.eval_rows))[: options.max_eval_samples]
    portions = [portion(rows, rows_by_rank, rank) for rank in range(world.size)]
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # NLLs, hits, targets
    parts.model.eval()
    micro, in_step = options.per_device_train_batch_size, is_sharded(parts.model)
    for batch in cut(parts.eval_rows, portions[world.rank], micro, [len(p) for p in portions] if in_step else None):
        tensors = to_device(host_tensors(batch), world.device)
        losses, correct = parts.model.score(**tensors)
        sums += torch.stack([losses.double().sum(), correct.sum().double(), (tensors["labels"] >= 0).sum().double()])
    loss_sum, hits, targets = process_group.sum_in_place(sums).tolist()
    if not math.isfinite(loss_sum):
        raise FlareError("the evaluation loss is not finite; the last checkpoint is good")
    return loss_sum / targets, hits / targets
