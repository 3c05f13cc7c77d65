"""Two ranks: rank 1 calls for help and ends; rank 0 waits on a lock in C, where no signal handler of Python's runs."""

import os
import signal
import sys

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
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    signal.sigwait({signal.SIGUSR2})
    return 0


if __name__ == "__main__":
    sys.exit(main())
