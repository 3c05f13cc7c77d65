"""Run under torchrun: train with results that are read a step late; only rank 1 is asked to stop, in its third step.

usage: late_stop.py BASE CORPUS CACHE OUT    (writes how each rank ended, at which step and with which checkpoints)
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from flare.distributed import process_group
from flare.train.step_results import PendingResults
from tests.train.rank_gradients import leave, make_trainer


def main() -> None:
    base, corpus, cache_dir, out = map(Path, sys.argv[1:])
    runner = make_trainer(
        base, str(corpus), cache_dir, out.parent, max_steps=50, per_device_train_batch_size=2, global_batch_size=4,
        eval_steps=None,
    )  # fmt: skip
    runner.pending = PendingResults(torch.device("cpu"), lag=1)
    saved = []
    runner.callbacks = replace(runner.callbacks, save=lambda train_state: saved.append(train_state.step))
    step = runner._step

    def request_stop_in_third_step() -> None:
        if runner.train_state.step == 2 and runner.world.rank == 1:
            runner.stop_request.signal_name = "SIGTERM"
        step()

    runner._step = request_stop_in_third_step
    ended = runner.train()
    everyone = process_group.gather_objects([ended, runner.train_state.step, saved])
    if runner.world.is_main:
        out.write_text(json.dumps(everyone))
    leave()


if __name__ == "__main__":
    main()
