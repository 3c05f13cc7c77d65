"""SIGKILL at any moment (rows 1-3 and 36 of the matrix): the same command again gives the uninterrupted run."""

import random
import re
from pathlib import Path

import pytest

from tests.faults.harness import ROWS, STEPS, Zygote, complete_steps, digest, rows_by_step, stage

KILLED = -9
SEED = 8


@pytest.mark.parametrize("step", sorted(random.Random(SEED).sample(range(1, STEPS + 1), 3)))
def test_killed_in_a_step(zygote: Zygote, flags: list[str], run: Path, whole: Path, tmp_path: Path, step: int) -> None:
    """Row 1."""
    rows = ("record_rows", str(tmp_path / "rows.jsonl"))
    assert zygote.run(*flags, fault=(*rows, ["die_at_step", step])).returncode == KILLED
    newest = (step - 1) // 2 * 2
    assert complete_steps(run)[-1:] == ([newest] if newest else [])
    again = zygote.run(*flags, fault=rows)
    assert again.returncode == 0, again.stderr
    assert (f"resumes from checkpoint-{newest}" in again.stderr) == (newest > 0)
    assert digest(run / "final_model") == digest(whole / "final_model")
    assert rows_by_step(tmp_path / "rows.jsonl") == rows_by_step(whole.parent / "rows.jsonl")
    block = stage(run)
    assert (block["status"], block["totals"]["steps"]) == ("finished", STEPS)
    assert block["totals"]["tokens"] == STEPS * ROWS * 32
    assert [r["step"] for r in block["history"] if "loss" in r] == list(range(1, STEPS + 1))
