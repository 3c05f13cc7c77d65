"""Run under torchrun: fp16 steps of a tiny model whose loss scale is far too large, and of which one overflows on rank
1 alone; writes what each rank decided.

usage: overflow_ranks.py BASE CORPUS CACHE OUT ddp|fsdp LAG
"""

import json
import sys
from pathlib import Path

import torch

from flare.distributed import process_group
from flare.distributed.fsdp import full_tensor, local_tensor
from flare.train.step_results import PendingResults
from flare.train.train_state import TrainState
from tests.train.rank_gradients import leave, make_trainer

STEPS = 24
BROKEN = STEPS - 2
"""The step (0-based) that overflows on rank 1 alone."""


def main() -> None:
    base, corpus, cache_dir, out = map(Path, sys.argv[1:5])
    runner = make_trainer(
        base, str(corpus), cache_dir, out.parent, sys.argv[5], "fp16", TrainState(loss_scale=2.0**34), max_steps=STEPS,
        per_device_train_batch_size=2, global_batch_size=4,
    )  # fmt: skip
    if sys.argv[6] == "1":
        runner.pending = PendingResults(torch.device("cpu"), lag=1, loss_scale=runner.loss_scale)
    unscale = runner.loss_scale.unscale

    def break_one(parameters: list) -> None:
        unscale(parameters)
        if runner.train_state.step == BROKEN and runner.world.rank == 1:
            local_tensor(parameters[0].grad)[0] = float("inf")

    runner.loss_scale.unscale = break_one
    scales, changed = [], []
    norm = runner.components.model.causal_lm.model.norm.weight
    for _ in range(STEPS):
        before = full_tensor(norm.detach()).clone()
        runner._step()
        scales.append(runner.loss_scale.scale.item())
        changed.append(not torch.equal(before, full_tensor(norm.detach())))
    runner._read_results()
    count = runner.train_state.overflow_steps
    everyone = process_group.gather_objects({"scales": scales, "changed": changed, "overflow_steps": count})
    if runner.world.is_main:
        out.write_text(json.dumps(everyone))
    leave()


if __name__ == "__main__":
    main()
