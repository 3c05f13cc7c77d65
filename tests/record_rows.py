"""train_qwen_multi_gpu.py as it is, writing down the rows that every rank reads: RECORD FLAGS...

Run it as one process, or under torchrun. A line is added to RECORD.<process id> for each micro-batch, before it is
trained on: step, row indices, and a hash of each row's inputs, labels and positions.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

import train_qwen_multi_gpu as script
from flare.data.train_rows import Batch
from flare.errors import run_script
from flare.trainer import Trainer


def digests(batch: Batch) -> list[str]:
    """A hash of each row."""
    whole = np.stack([batch.input_ids, batch.labels, batch.position_ids], axis=1)
    return [hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=8).hexdigest() for row in whole]


def record(file: Path) -> None:
    """Wrap the trainer's rows, so that what it asks of them is written down."""
    step = Trainer._step

    def recorded_step(self: Trainer) -> tuple:
        rows, number = self.parts.train_rows, self.progress.step
        batch_of = type(rows).batch

        def batch(indices: np.ndarray) -> Batch:
            found = batch_of(rows, indices)
            line = {"step": number, "rank": self.world.rank, "rows": indices.tolist(), "digests": digests(found)}
            with open(f"{file}.{os.getpid()}", "a") as out:
                out.write(json.dumps(line) + "\n")
            return found

        rows.batch = batch
        try:
            return step(self)
        finally:
            del rows.batch

    Trainer._step = recorded_step


def main() -> int:
    record(Path(sys.argv[1]))
    return script.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(run_script(main))
