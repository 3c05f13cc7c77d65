"""Measures the speed of each rank with a few forward and backward passes before the first step.

Each rank works by itself: nothing is reduced, so no rank waits for another while the time is measured. No weight
changes, and the gradients are dropped.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

from flare.cpu import processor_name
from flare.distributed import process_group
from flare.distributed.process_group import World
from flare.logs import log
from flare.plan import balance
from flare.plan.balance import Balance

WARM_UP_PASSES, TIMED_PASSES = 1, 3


def choose_balance(option: str, num_rows: int, world: World, record: dict | None, work: Callable[[], int]) -> Balance:
    """Rows of each rank for a run with ``--balance option``. A collective with the same result on all ranks.

    Args:
        record: the balance of the checkpoint to resume from, if there is one.
        work: one forward and backward pass of a micro-batch; returns its rows.
    """
    weights = balance.parse_weights(option, world.size)
    if weights:
        return balance.balance_by_weights(num_rows, weights)
    if option == "equal" or world.size == 1:
        return balance.equal_balance(num_rows, world.size)
    gpus = process_group.gather_objects(_gpu(world.device))
    if option == "auto" and len(set(gpus)) == 1:
        return balance.equal_balance(num_rows, world.size, f"equal: all ranks have {gpus[0]}")
    known = balance.balance_from_checkpoint(record, num_rows, gpus)
    if known:
        return known
    log.info("unlike GPUs, or --balance measure: measuring each rank")
    seconds = process_group.gather_objects(seconds_per_row(work, world.device))
    return balance.balance_by_speed(num_rows, gpus, seconds)


def multiply_as_a_layer(config: dict, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
    """The forward matrix products of one MLP on random numbers: measures a GPU alone, which FSDP's passes cannot."""
    hidden = torch.randn(tokens, config["hidden_size"], device=device, dtype=dtype)
    weight = torch.randn(config["hidden_size"], config["intermediate_size"], device=device, dtype=dtype)
    for _ in range(3):
        hidden = (hidden @ weight) @ weight.T


def seconds_per_row(work: Callable[[], int], device: torch.device) -> float:
    """Median time per row over ``TIMED_PASSES`` calls of ``work``, after a warm-up."""
    timed = []
    for number in range(WARM_UP_PASSES + TIMED_PASSES):
        _wait_for(device)
        t0 = time.perf_counter()
        rows = work()
        _wait_for(device)
        if number >= WARM_UP_PASSES:
            timed.append((time.perf_counter() - t0) / rows)
    return median(timed)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gpu(device: torch.device) -> str:
    """The GPU's name, or processor and threads. Ranks for which it is equal count as equally fast."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()} ({torch.get_num_threads()} threads)"
