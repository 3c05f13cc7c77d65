"""One rank of ``benchmarks.balance``; rank 1 is slowed down to half speed.

usage (under torchrun): balance_ranks.py OUT ROUNDS STEPS ROWS
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.train_cpu import SHAPE, SMALL_VOCABULARY
from benchmarks.workload import RandomRows, Workload, random_model, train_flare
from flare.distributed import process_group
from flare.distributed.process_group import World
from flare.model.inputs import host_tensors
from flare.model.patches import apply_patches
from flare.model.training_model import TrainingModel
from flare.plan.balance import equal_balance
from flare.train.rank_speed import choose_balance, seconds_per_row

SEQ_LEN = 256
SLOW_RANK = 1


class Slowed(torch.nn.Module):
    """A training model whose forward pass sleeps ``seconds`` for each row."""

    def __init__(self, model: TrainingModel, seconds: float) -> None:
        super().__init__()
        self.model, self.seconds = model, seconds

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds * len(batch["input_ids"]))
        return self.model(**batch)

    def trainable_parameters(self):
        return self.model.trainable_parameters()


def main() -> None:
    out, rounds, steps, size = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    world = process_group.start(use_cuda=False, timeout_sec=600)
    shape = {**SHAPE, "vocab_size": SMALL_VOCABULARY, "num_hidden_layers": 4}
    workload = Workload("flare", shape, 2, [1, 3], batch_size=1, seq_len=SEQ_LEN, steps=steps)
    rows = RandomRows(steps * size, SEQ_LEN, SMALL_VOCABULARY)
    alone = max(process_group.gather_objects(pace(Slowed(model_of(workload), 0.0), rows, world)))
    slowed = Slowed(model_of(workload), alone if world.rank == SLOW_RANK else 0.0)
    paces = process_group.gather_objects(pace(slowed, rows, world))
    decided = choose_balance("measure", size, world, None, one_pass(slowed, rows))
    shares = {"equal": equal_balance(size, world.size).rows, "balanced": decided.rows}
    rates: dict[str, list[float]] = {name: [] for name in shares}
    for _ in range(rounds):
        for name, counts in shares.items():
            model = Slowed(model_of(workload), slowed.seconds)
            history = train_flare(model, workload, rows, world, counts)
            rates[name].append(median(entry["tokens_per_sec"] for entry in history[1:]))
    if world.is_main:
        found = {name: median(values) for name, values in rates.items()} | {"rounds": rates}
        found |= {"ideal": SEQ_LEN * sum(1 / p for p in paces), "seconds_per_row": paces}
        out.write_text(json.dumps(found | {"rows": {name: list(counts) for name, counts in shares.items()}}))
    process_group.stop()


def model_of(workload: Workload) -> TrainingModel:
    model = TrainingModel(random_model(workload), documents=False)
    apply_patches(model)
    return model


def one_pass(model: Slowed, rows: RandomRows):
    """The work that is timed: a row forward and backward."""
    batch = host_tensors(rows.batch(np.arange(1)))

    def work() -> int:
        model(**batch).backward()
        model.zero_grad()
        return 1

    return work


def pace(model: Slowed, rows: RandomRows, world: World) -> float:
    """Seconds of a row; both ranks measure at the same time."""
    torch.distributed.barrier()
    return seconds_per_row(one_pass(model, rows), world.device)


if __name__ == "__main__":
    main()
