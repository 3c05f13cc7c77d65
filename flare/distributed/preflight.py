"""Preflight check: a small all-reduce with a short timeout, before anything else.

Without it, a broken connection between GPUs or nodes would show as a hang until ``--ddp_timeout``, half an hour.
"""

import atexit
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from flare.errors import EnvError, first_line

TIMEOUT_SEC = 30.0
"""Timeout of the preflight check, including the time to connect all ranks (issue 3)."""
ELEMENTS = 2**18
"""fp32 elements of the all-reduce, 1 MiB: large enough to use the path of gradients, not that of tiny messages."""


def wait_for_ranks(timeout_sec: float) -> tuple[dist.Store, int, int]:
    """Wait until every rank has started. Returns (store, rank, world size).

    Ranks may start minutes apart, because a node may tokenize first. So this wait has the timeout of the run. The
    timeout of the preflight check begins when all ranks have started.

    Raises: EnvError naming the ranks that did not start.
    """
    timeout = timedelta(seconds=timeout_sec)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore("flare", store)
        store.set(f"host/{rank}", socket.gethostname())
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise EnvError(f"cannot reach the run's rendezvous {where}: {first_line(error)}") from error
    try:
        store.wait([f"host/{r}" for r in range(size)], timeout)
    except dist.DistError as error:
        missing = _ranks_without(store, "host", size)
        raise EnvError(f"{_describe_ranks(missing)} did not start within --ddp_timeout {timeout_sec:g} s") from error
    return store, rank, size


def run_preflight_check(
    store: dist.Store, rank: int, size: int, device: torch.device, timeout_sec: float = TIMEOUT_SEC
) -> None:
    """Run an all-reduce over a temporary process group. Every rank calls this.

    Raises: EnvError when the sum is wrong or missing after ``timeout_sec``. The message says where to look.
    """
    failures: list[BaseException] = []

    def check() -> None:
        try:
            all_reduce_and_check(store, rank, size, device, timeout_sec)
        except BaseException as error:
            failures.append(error)

    # In a thread, because an NCCL call that hangs cannot be interrupted.
    thread = threading.Thread(target=check, name="preflight check", daemon=True)
    t0 = time.monotonic()
    thread.start()
    thread.join(timeout_sec)
    if not thread.is_alive() and not failures:
        return
    problem = f"did not end within {timeout_sec:g} s"
    if failures:
        problem = f"failed after {time.monotonic() - t0:.1f} s ({first_line(failures[0])})"
    # The destructor of a hung process group would wait forever. The error is printed before exit handlers run.
    atexit.register(os._exit, EnvError.exit_code)
    raise EnvError(f"the first all-reduce of {size} processes {problem}; {_where_to_look(store, size, device)}")


def all_reduce_and_check(store: dist.Store, rank: int, size: int, device: torch.device, timeout_sec: float) -> None:
    """Connect, sum 1 + 2 + ... + size, and compare the sum with the expected one."""
    use_cuda = device.type == "cuda"
    if use_cuda:
        torch.cuda.set_device(device)  # the current device is set per thread
    # NCCL's watchdog ends the process at its timeout. Ours is shorter, so that our error comes first.
    timeout = timedelta(seconds=timeout_sec * (2 if use_cuda else 1))
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        store=dist.PrefixStore("preflight", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    values = torch.full((ELEMENTS,), float(rank + 1), device=device)
    work = dist.all_reduce(values, async_op=True)
    store.set(f"joined/{rank}", "")
    work.wait()
    found = {values.min().item(), values.max().item()}
    expected = size * (size + 1) / 2
    if found != {expected}:
        raise RuntimeError(f"the sum is {found} instead of {expected:g}: data is damaged in transit")
    dist.destroy_process_group()


def _where_to_look(store: dist.Store, size: int, device: torch.device) -> str:
    """The usual fix, and the ranks that did not join or the nodes that cannot reach each other."""
    advice = ""
    if device.type == "cuda":
        advice = (
            "NCCL_P2P_DISABLE=1 in the environment is the usual fix on PCIe servers (NCCL_DEBUG=INFO prints more); "
        )
    missing = []
    with suppress(dist.DistError):
        missing = _ranks_without(store, "joined", size)
        if 0 < len(missing) < size:
            return f"{advice}look at {_describe_ranks(missing, store)}, which did not join"
    nodes = "its nodes"
    with suppress(dist.DistError):
        nodes = _describe_ranks(list(range(size)), store)
    return f"{advice}look at the network between {nodes} (set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME)"


def _ranks_without(store: dist.Store, what: str, size: int) -> list[int]:
    """Ranks that have not set ``WHAT/RANK`` in the store."""
    return [rank for rank in range(size) if not store.check([f"{what}/{rank}"])]


def _describe_ranks(ranks: list[int], store: dist.Store | None = None) -> str:
    """ "rank 1 (b)" with the host name when the store has it, else "rank 1". At most eight ranks.

    ``check`` comes before ``get``, because ``get`` would wait for a missing key.
    """
    hosts = [
        f" ({store.get(f'host/{r}').decode()})" if store and store.check([f"host/{r}"]) else "" for r in ranks[:8]
    ]
    names = [f"rank {rank}{host}" for rank, host in zip(ranks, hosts, strict=False)]
    return ", ".join(names) + (" and others" if len(ranks) > 8 else "")
