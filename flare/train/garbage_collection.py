"""Python's garbage collector at a steady interval, instead of whenever it likes, at another moment on every rank.

A collection over the objects of torch and transformers takes up to half a second, and while one rank collects all
others wait for it. Source: nanochat and torchtitan do the same (shared/FIELD.md).
"""

import contextlib
import gc
from collections.abc import Callable, Iterator

COLLECT_STEPS = 100
"""Steps between collections of the youngest objects: tens of seconds, and a training step leaves few cycles."""


@contextlib.contextmanager
def collect_at_intervals() -> Iterator[Callable[[], None]]:
    """Gives a function to call after each step; the collector is as before when the block ends."""
    was_enabled = gc.isenabled()
    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps == 1:  # warm-up is over: what is there now stays
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
