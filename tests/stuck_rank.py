"""Two ranks: rank 1 calls for help and ends; rank 0 waits in C, where no signal handler of Python's runs, for what a
rank was to tell in the store, as the start of a process group does: no other thread gets at that connection."""

import os
import sys
from datetime import timedelta

from flare import distress, distributed


def main() -> int:
    world = distributed.start(use_cuda=False, timeout_sec=60)
    distress.GRACE_SEC = 0.5
    distress.listen(world)
    distributed.barrier()
    if world.rank == 1:
        distress.call(world)
        sys.stdout.flush()
        os._exit(3)
    world.store.wait(["never"], timedelta(minutes=5))
    return 0


if __name__ == "__main__":
    sys.exit(main())
