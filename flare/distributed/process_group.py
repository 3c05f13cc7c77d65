"""The process group and its collectives. Every helper also works at world size 1, so callers need no special case.

Ranks come from torchrun's environment. CPU runs use gloo, CUDA runs use nccl.
"""

import functools
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from flare.distributed.preflight import TIMEOUT_SEC, run_preflight_check, wait_for_ranks
from flare.errors import ConfigError, EnvError, FlareError, first_line, is_out_of_memory, while_phase
from flare.gpus.nvidia_smi import Gpu
from flare.gpus.selection import check_gpu

T = TypeVar("T")

LOST_PEER_MESSAGES = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "remote process exited")
"""Parts of the errors that gloo and NCCL raise when another rank is gone."""
AMPERE = (8, 0)
"""The lowest compute capability with bf16."""
WAIT_HOURS = 12
"""How long ranks wait for work that only rank 0 does. Saving a large checkpoint to a slow disk is not a hang."""


@dataclass(frozen=True)
class World:
    """Rank and device of this process, and the number of processes."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None  # messages between ranks outside collectives; None at world size 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def rank_from_environment() -> int:
    """Rank of this process, as torchrun sets it; 0 for a single process."""
    return int(os.environ.get("RANK", 0))


def start(
    use_cuda: bool,
    timeout_sec: int,
    planned: Sequence[Gpu] = (),
    preflight_timeout_sec: float = TIMEOUT_SEC,
    needs_bf16: bool = False,
) -> World:
    """Bind this process to its GPU and join the process group (none for a single process).

    Args:
        timeout_sec: timeout of the run's collectives.
        planned: the GPUs of the plan, in the order of local ranks. Not checked when empty.
        preflight_timeout_sec: timeout of the preflight check.
        needs_bf16: the run computes in bf16.

    Raises: EnvError when the GPU is not the planned one, when it lacks bf16 and the run needs it, or when the
        processes cannot reach each other.
    """
    rank, local_rank = rank_from_environment(), int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        bind_gpu(local_rank, planned, needs_bf16)
    store = None
    if size > 1:
        store, rank, size = wait_for_ranks(timeout_sec)
        run_preflight_check(store, rank, size, device, preflight_timeout_sec)
        dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            store=dist.PrefixStore("run", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_sec),
            device_id=device if use_cuda else None,
        )
    return World(rank, local_rank, size, device, store)


def bind_gpu(local_rank: int, planned: Sequence[Gpu], needs_bf16: bool = False) -> None:
    """Make the GPU of this local rank the current device. It is checked before anything is allocated on it.

    Raises: EnvError when there is no such GPU, when it is not the planned one, or when it lacks a needed bf16.
    """
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise EnvError(
            f"local rank {local_rank} has no GPU: torch sees {count} "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}); see nvidia-smi and dmesg"
        )
    torch.cuda.set_device(local_rank)
    if planned:
        gpu = torch.cuda.get_device_properties(local_rank)
        check_gpu(planned[local_rank], gpu.name, str(gpu.uuid))
    if needs_bf16 and (capability := torch.cuda.get_device_capability(local_rank)) < AMPERE:
        raise EnvError(
            f"{torch.cuda.get_device_name(local_rank)} has no bf16 (compute capability {capability[0]}."
            f"{capability[1]}, below {AMPERE[0]}.{AMPERE[1]}); use --precision fp16"
        )


def check_same_settings(world: World, settings: dict[str, object]) -> None:
    """Check that every rank has the same settings. A collective: all ranks raise, or none.

    Raises: ConfigError naming the first setting that differs, with both values, ranks and host names.
    """
    everyone = gather_objects((socket.gethostname(), settings))
    host, first = everyone[0]
    for rank, (other_host, other) in enumerate(everyone):
        for name, value in first.items():
            if other[name] != value:
                raise ConfigError(
                    f"ranks differ in {name}: {value!r} on rank 0 ({host}), {other[name]!r} on rank {rank} "
                    f"({other_host}); start every node with the same command, and give the value explicitly"
                )


def stop() -> None:
    """Wait for all ranks, then destroy the process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        _long_timeout_group.cache_clear()


def end_process(exit_code: int) -> NoReturn:
    """Exit a worker that has closed its files, without the interpreter's shutdown.

    A gloo thread may still have to free a reduced tensor, for which it needs the interpreter. During the shutdown the
    interpreter ends such a thread, and C++ then aborts with SIGABRT (seen with FSDP2 on two busy cores).
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _device() -> torch.device:
    backend = dist.get_backend() if dist.is_initialized() else "gloo"
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over ranks in place, and return it. On a GPU the sum is only queued: no host sync."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(values: list[float]) -> list[float]:
    """The maximum of each value over ranks, computed in float64."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER_MESSAGES)


def gather_objects(item: object) -> list:
    """The (small, picklable) objects of all ranks, in rank order, on every rank."""
    if not dist.is_initialized():
        return [item]
    items: list = [None] * dist.get_world_size()
    dist.all_gather_object(items, item, group=_long_timeout_group())
    return items


def scatter_objects(items: list | None) -> object:
    """This rank's item of rank 0's list, which has one picklable item per rank. The other ranks pass None."""
    if not dist.is_initialized():
        return items[0]
    received: list = [None]
    dist.scatter_object_list(received, items, src=0, group=_long_timeout_group())
    return received[0]


@functools.cache
def _long_timeout_group() -> dist.ProcessGroup:
    """A gloo group in which ranks may wait for hours while rank 0 saves. ``--ddp_timeout`` is for training only."""
    return dist.new_group(backend="gloo", timeout=timedelta(hours=WAIT_HOURS))


def run_on_main_rank(world: World, work: Callable[[], T]) -> T:
    """Run a function on rank 0 only. Every rank returns its (small, picklable) result or raises its error.

    A collective: every rank calls it, so all ranks continue or all fail.
    """
    return run_on_all_ranks(world, lambda: work() if world.is_main else None)[0]


def run_on_all_ranks(world: World, work: Callable[[], T]) -> list[T]:
    """Run a function on every rank. Returns the (small, picklable) results in rank order. A collective.

    Raises: the error of the lowest rank that failed, on every rank.
    """
    result, failure = None, None
    try:
        result = work()
    except FlareError as error:
        failure = error
    except Exception as error:  # any error: the other ranks must not wait for this one
        if is_out_of_memory(error):
            failure = FlareError(f"rank {world.rank} ran out of memory{while_phase()} ({first_line(error)})")
        elif isinstance(error, OSError):
            failure = EnvError(str(error))
        else:
            failure = FlareError(f"rank {world.rank}: {type(error).__name__}: {error}")
        failure.__cause__ = error
    results, failures = zip(*gather_objects((result, failure)), strict=True)
    _raise_first(failures)
    return list(results)


def raise_first_failure(failure: Exception | None) -> None:
    """Raise the error of the lowest rank that failed on every rank. A collective."""
    _raise_first(gather_objects(failure))


def _raise_first(failures: Sequence[Exception | None]) -> None:
    for failure in failures:
        if failure is not None:
            raise failure
