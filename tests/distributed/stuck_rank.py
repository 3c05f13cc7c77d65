"""Two ranks: rank 1 calls for help and ends; rank 0 waits in C, where no signal handler of Python's runs, for what a
rank was to tell in the store, as the start of a process group does: no other thread gets at that connection."""

import os
import sys
from datetime import timedelta

import torch

from flare.distributed import peer_failure, process_group


def main() -> int:
    world = process_group.start(use_cuda=False, timeout_sec=60)
    peer_failure.GRACE_SEC = 0.5
    peer_failure.watch_for_failures(world)
    torch.distributed.barrier()
    if world.rank == 1:
        peer_failure.report_failure(world)
        sys.stdout.flush()
        os._exit(3)
    world.store.wait(["never"], timedelta(minutes=5))
    return 0


if __name__ == "__main__":
    sys.exit(main())
