"""Runs train_qwen_multi_gpu.py and records the rows that every rank reads: RECORD FLAGS...

Run it as one process or with torchrun. Before each training step, a line is added to RECORD.<process id>: the step,
its row indices, and a hash of each row's inputs, labels and positions.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

import train_qwen_multi_gpu as script
from flare.errors import run_script
from flare.train.loader import StepLoader, StepRows


def digests(step: StepRows) -> list[str]:
    """A hash of each of this rank's rows."""
    found = []
    for batch in step.batches:
        rows = torch.stack([batch["input_ids"], batch["labels"], batch["position_ids"]], dim=1).numpy()
        found += [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows]
    return found


def record(file: Path) -> None:
    """Wrap ``StepLoader.take`` so that it records the rows."""
    take = StepLoader.take

    def recorded_take(self: StepLoader, position: int) -> StepRows:
        step = take(self, position)
        line = {"step": position // self.step_rows, "first": self.mine.start, "rows": step.rows[self.mine].tolist()}
        with open(f"{file}.{os.getpid()}", "a") as out:
            out.write(json.dumps(line | {"digests": digests(step)}) + "\n")
        return step

    StepLoader.take = recorded_take


def main() -> int:
    record(Path(sys.argv[1]))
    return script.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(run_script(main))
