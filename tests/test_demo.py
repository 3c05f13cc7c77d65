"""The demo as a new user runs it: the expected losses for three seeds, and no step is repeated."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import REPO, script_environment


def run_demo(output: Path, seed: int, *flags: str) -> subprocess.CompletedProcess:
    command = ["bash", str(REPO / "run_training.sh"), "demo", "--seed", str(seed), "--output_dir", str(output), *flags]
    environment = script_environment(PYTHON=sys.executable)
    environment.pop("OMP_NUM_THREADS")
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_removing_rope_raises_the_loss_and_the_two_stages_recover_it(tmp_path: Path, seed: int) -> None:
    result = run_demo(tmp_path, seed)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "demo" / "evaluation" / "evaluation_results.json").read_text())
    loss = {m["label"]: m["datasets"]["embedded"]["loss"] for m in results["milestones"]}
    base, patched, stage1, stage2 = (loss[name] for name in ("base", "patched, untrained", "stage 1", "stage 2"))
    jump = patched - base
    assert jump > 0.1
    assert stage1 < patched - 0.5 * jump
    assert stage2 < stage1
    assert stage2 < base + 0.15 * jump
    for words in ("report:", "TensorBoard:", "final model:"):
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(words)]
    assert Path(line.split()[-1], "config.json").is_file()
    report = (tmp_path / "demo" / "evaluation" / "evaluation_report.md").read_text()
    assert all(
        (tmp_path / "demo" / "evaluation" / plot).is_file() for plot in re.findall(r"\((plots/[^)]+)\)", report)
    )

    again = run_demo(tmp_path, seed)
    assert again.returncode == 0
    assert again.stdout.count("already done") == 6
    assert "$ python" not in again.stdout
    if seed == 0:
        assert_control_is_added(tmp_path)


def assert_control_is_added(output: Path) -> None:
    """The loss of the control is below that of the NoPE model. Without it, more training would look like a success."""
    result = run_demo(output, 0, "--control")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("already done") == 5
    results = json.loads((output / "demo" / "evaluation" / "evaluation_results.json").read_text())
    loss = {m["label"]: m["datasets"]["embedded"]["loss"] for m in results["milestones"]}
    assert loss["control (stage 2)"] < loss["stage 2"]
    assert results["verdict"].startswith("Recovered at a cost")
    assert "The squares are the control" in (output / "demo" / "evaluation" / "evaluation_report.md").read_text()
    assert run_demo(output, 0, "--control").stdout.count("already done") == 8
