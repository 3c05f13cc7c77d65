"""Run under torchrun: resolve the balance of 12 rows when rank 1 does every pass four times; write the results.

usage: slow_rank.py OUT
"""

import json
import sys
from pathlib import Path

import torch

from flare.distributed import process_group
from flare.train.rank_speed import choose_balance

SIZE, ROWS, SLOWDOWN = 400, 2, 4


def main() -> None:
    world = process_group.start(use_cuda=False, timeout_sec=60)
    matrix = torch.randn(SIZE, SIZE)

    def work() -> int:
        for _ in range(SLOWDOWN if world.rank == 1 else 1):
            for _ in range(20):
                matrix @ matrix
        return ROWS

    decided = choose_balance("measure", 12, world, None, work)
    everyone = process_group.gather_objects(decided.as_dict())
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(everyone))
    process_group.stop()


if __name__ == "__main__":
    main()
