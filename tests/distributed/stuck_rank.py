"""Two ranks: rank 1 reports a failure and ends. Rank 0 waits for a key of the store inside C code, as the start of a
process group does. There, no Python signal handler runs, and no other thread can use the same connection."""

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
