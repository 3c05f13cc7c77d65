"""A rank that cannot go on tells the others, which may be waiting for it inside a collective.

A call into NCCL that waits for a rank that is gone ends at ``--ddp_timeout``, and no Python signal handler runs in it.
So a thread of every rank looks at the run's store, and ends its process some seconds after a call for help.
"""

import os
import threading
import time
from contextlib import suppress
from dataclasses import replace

import torch.distributed as dist

from flare.distributed.process_group import World
from flare.errors import FlareError

KEY = "distress"

POLL_SEC = 1.0
"""Between looks: one small request a second and rank."""

GRACE_SEC = 10.0
"""What a rank that is not stuck has to end by itself, with its own last words."""


def call(world: World) -> None:
    """Tell all ranks that this one ends."""
    if world.store is not None:
        with suppress(dist.DistError):
            world.store.set(KEY, str(world.rank))


def heard(world: World) -> bool:
    """Whether another rank has called: then an error of a collective is only the echo of its end."""
    with suppress(dist.DistError):
        if world.store is not None and world.store.check([KEY]):
            return int(world.store.get(KEY)) != world.rank
    return False


def listen(world: World) -> None:
    """Start the thread that ends this process when another rank has called and nothing else ends it."""
    if world.store is not None:
        # A connection of its own: on the main thread's it would wait as long as that waits for a rank that is gone.
        own = replace(world, store=world.store.clone())
        threading.Thread(target=_listen, args=(own,), name="distress", daemon=True).start()


def _listen(world: World) -> None:
    while not heard(world):
        time.sleep(POLL_SEC)
    time.sleep(GRACE_SEC)
    os._exit(FlareError.exit_code)
