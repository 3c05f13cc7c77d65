"""A rank that fails notifies the other ranks, which may be waiting for it inside a collective.

An NCCL call that waits for a dead rank ends only at ``--ddp_timeout``, and Python signal handlers do not run during
the call. So each rank has a thread that polls the run's store. It ends the process some seconds after a rank has
reported that it failed.
"""

import os
import threading
import time
from contextlib import suppress
from dataclasses import replace

import torch.distributed as dist

from flare.distributed.process_group import World
from flare.errors import FlareError

FAILED_RANK_KEY = "failed_rank"

POLL_SEC = 1.0
"""Time between two polls. A poll is one small request per rank."""

GRACE_SEC = 10.0
"""Time for a rank that does not hang to end by itself and report its own error."""


def report_failure(world: World) -> None:
    """Write to the store that this rank failed."""
    if world.store is not None:
        with suppress(dist.DistError):
            world.store.set(FAILED_RANK_KEY, str(world.rank))


def another_rank_failed(world: World) -> bool:
    """Whether another rank has reported a failure. An error of a collective is then only a consequence of it."""
    with suppress(dist.DistError):
        if world.store is not None and world.store.check([FAILED_RANK_KEY]):
            return int(world.store.get(FAILED_RANK_KEY)) != world.rank
    return False


def watch_for_failures(world: World) -> None:
    """Start a thread that ends this process when another rank has reported a failure."""
    if world.store is not None:
        # The thread has its own connection: on a shared one it would wait behind a blocked call of the main thread.
        cloned = replace(world, store=world.store.clone())
        threading.Thread(target=_watch, args=(cloned,), name="peer failure", daemon=True).start()


def _watch(world: World) -> None:
    while not another_rank_failed(world):
        time.sleep(POLL_SEC)
    time.sleep(GRACE_SEC)
    os._exit(FlareError.exit_code)
