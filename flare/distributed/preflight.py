"""Do the processes of a run reach each other? A small all-reduce with a time limit of its own, before all else.

Without it a broken path between GPUs or hosts shows as a hang until ``--ddp_timeout``, half an hour later.
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
"""What the trial may take, the connections between all ranks included (issue 3)."""
ELEMENTS = 2**18
"""fp32 numbers of the trial, 1 MiB: enough to go the way that gradients go, not a shortcut for tiny messages."""


def wait_for_ranks(timeout_sec: float) -> tuple[dist.Store, int, int]:
    """Wait until every rank is there. Returns (store, rank, world size).

    Ranks may come minutes apart: a host may tokenise first. So this wait has the run's timeout, the trial's
    limit starts when all are there.

    Raises: EnvError naming the ranks that did not come.
    """
    timeout = timedelta(seconds=timeout_sec)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore("flare", store)
        store.set(f"host/{rank}", socket.gethostname())
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise EnvError(f"cannot reach the run's meeting point {where}: {first_line(error)}") from error
    try:
        store.wait([f"host/{r}" for r in range(size)], timeout)
    except dist.DistError as error:
        gone = _ranks_without(store, "host", size)
        raise EnvError(f"{_ranks(gone)} did not start within --ddp_timeout {timeout_sec:g} s") from error
    return store, rank, size


def run_preflight_check(
    store: dist.Store, rank: int, size: int, device: torch.device, timeout_sec: float = TIMEOUT_SEC
) -> None:
    """All-reduce over a process group of its own, which is gone afterwards. Every rank calls it.

    Raises: EnvError when the sum is wrong or not there after ``timeout_sec``; it says where to look.
    """
    failures: list[BaseException] = []

    def trial() -> None:
        try:
            _all_reduce(store, rank, size, device, timeout_sec)
        except BaseException as error:
            failures.append(error)

    # In a thread, for a call into NCCL that hangs cannot be interrupted.
    thread = threading.Thread(target=trial, name="fabric check", daemon=True)
    t0 = time.monotonic()
    thread.start()
    thread.join(timeout_sec)
    if not thread.is_alive() and not failures:
        return
    problem = f"did not end within {timeout_sec:g} s"
    if failures:
        problem = f"failed after {time.monotonic() - t0:.1f} s ({first_line(failures[0])})"
    # Destructors of a hung process group would wait for it for ever; the error is told before exit handlers run.
    atexit.register(os._exit, EnvError.exit_code)
    raise EnvError(f"the first all-reduce of {size} processes {problem}; {_where_to_look(store, size, device)}")


def _all_reduce(store: dist.Store, rank: int, size: int, device: torch.device, timeout_sec: float) -> None:
    """The trial itself: connect, sum 1 + 2 + ... + size, compare."""
    use_cuda = device.type == "cuda"
    if use_cuda:
        torch.cuda.set_device(device)  # it is a thread's own setting
    # NCCL's watchdog ends the process when its timeout passes: not before our limit has given the reason.
    timeout = timedelta(seconds=timeout_sec * (2 if use_cuda else 1))
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        store=dist.PrefixStore("trial", store),
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
        raise RuntimeError(f"the sum is {found} instead of {expected:g}: data is damaged on its way")
    dist.destroy_process_group()


def _where_to_look(store: dist.Store, size: int, device: torch.device) -> str:
    """The usual cure, and the ranks that are missing or the hosts that do not reach each other."""
    advice = ""
    if device.type == "cuda":
        advice = (
            "NCCL_P2P_DISABLE=1 in the environment is the usual cure on PCIe servers (NCCL_DEBUG=INFO tells more); "
        )
    missing = []
    with suppress(dist.DistError):
        missing = _ranks_without(store, "joined", size)
        if 0 < len(missing) < size:
            return f"{advice}look at {_ranks(missing, store)}, which did not join"
    hosts = "its hosts"
    with suppress(dist.DistError):
        hosts = f"{_ranks(list(range(size)), store)}"
    return f"{advice}look at the network between {hosts} (GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME chooses it)"


def _ranks_without(store: dist.Store, what: str, size: int) -> list[int]:
    return [rank for rank in range(size) if not store.check([f"{what}/{rank}"])]


def _ranks(ranks: list[int], store: dist.Store | None = None) -> str:
    """ "rank 1 (host b)", "rank 1, rank 3"; at most eight. Asks the store only for what it has: it would wait."""
    known = [
        f" ({store.get(f'host/{r}').decode()})" if store and store.check([f"host/{r}"]) else "" for r in ranks[:8]
    ]
    names = [f"rank {rank}{host}" for rank, host in zip(ranks, known, strict=False)]
    return ", ".join(names) + (" and others" if len(ranks) > 8 else "")
