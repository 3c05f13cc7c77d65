"""Runs of the evaluation script, and the comparison of their results."""

import json
from pathlib import Path

import pytest

from tests.processes import run_script

RELATIVE = 1e-6


def evaluate(output: Path, *flags: object) -> dict:
    result = run_script("evaluate_model_enhanced.py", "--output_dir", output, "--generate_tokens", 0, *flags)
    assert result.returncode == 0, result.stderr
    return json.loads((output / "evaluation_results.json").read_text())


def same(one: object, other: object) -> None:
    """Equal, floats to 1e-6 (counts exactly)."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=RELATIVE)
    else:
        assert other == one
