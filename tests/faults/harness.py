"""Shared by the rows of the fault matrix: runs as processes, and the oracles that are checked after each.

The oracles of shared/FAULTS.md: (a) the final weights are the uninterrupted run's, bit for bit; (b) every row was
consumed once; (c) no complete checkpoint was lost; (d) training_metrics.json records correctly how the run ended;
(e) no traceback; (f) no process left behind.
"""

import hashlib
import json
from pathlib import Path

from flare.checkpoint.directory import list_checkpoints

STEPS = 8
SAVE_EVERY = 2
ROWS = 2
"""Of a step."""


def workers(launcher: int) -> dict[int, int]:
    """Rank -> process id of a launcher's workers."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for pid in children:
        variables = dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in v)
        if "RANK" in variables:
            ranks[int(variables["RANK"])] = int(pid)
    return ranks


# -- oracles -----------------------------------------------------------------------------------------------------


def digest(model_dir: Path) -> str:
    """sha256 of a directory's weights."""
    return hashlib.sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()


def stage(run: Path, number: int = 1) -> dict:
    """The stage's block of training_metrics.json, which is valid JSON whatever happened."""
    return json.loads((run / "training_metrics.json").read_text(encoding="utf-8"))["stages"][str(number)]


def complete_steps(run: Path) -> list[int]:
    """Steps of the checkpoints whose every file matches its manifest."""
    checkpoints = list_checkpoints(run / "checkpoints")
    for checkpoint in checkpoints:
        checkpoint.verify()
    return [checkpoint.step for checkpoint in checkpoints]


def rows_by_step(path: Path) -> dict[int, list[int]]:
    """First row number of a step -> its rows, as the last process that did this step read them (``record_rows``).

    The rows after the last step are read ahead, too; they are not part of the run.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {first: rows for first, rows in lines if first < STEPS * ROWS}
