"""Runs Python's garbage collector at fixed steps, on all ranks at the same time.

A collection over the objects of torch and transformers takes up to half a second. If each rank collects at another
time, all others wait for it. Source: nanochat and torchtitan do the same.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator

COLLECT_STEPS = 100
"""Steps between collections of the youngest objects: tens of seconds. A training step leaves few reference cycles."""


@contextlib.contextmanager
def collect_at_intervals() -> Iterator[Callable[[], None]]:
    """Yields a function to call after each step. At the end of the block the collector has its earlier settings."""
    was_enabled = gc.isenabled()
    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps == 1:  # warm-up is over: the objects that exist now are kept to the end
            gc.collect()
            gc.freeze()
            gc.disable()
        elif steps % COLLECT_STEPS == 0:
            gc.collect(1)

    try:
        yield after_step
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
