"""SIGKILL at any moment (rows 1-3 and 36 of the matrix): the same command then has the uninterrupted run's result."""

import random
import re
import shutil
from pathlib import Path

import pytest

from tests.faults.conftest import run_flags
from tests.faults.harness import ROWS, STEPS, complete_steps, digest, rows_by_step, stage
from tests.processes import Zygote

KILLED = -9
SEED = 8


@pytest.mark.parametrize("step", sorted(random.Random(SEED).sample(range(1, STEPS + 1), 3)))
def test_killed_in_a_step(
    zygote: Zygote, flags: list[str], run: Path, uninterrupted: Path, tmp_path: Path, step: int
) -> None:
    """Row 1."""
    rows = ("record_rows", str(tmp_path / "rows.jsonl"))
    assert zygote.run(*flags, fault=(*rows, ["die_at_step", step])).returncode == KILLED
    newest = (step - 1) // 2 * 2
    assert complete_steps(run)[-1:] == ([newest] if newest else [])
    again = zygote.run(*flags, fault=rows)
    assert again.returncode == 0, again.stderr
    assert (f"resumes from checkpoint-{newest}" in again.stderr) == (newest > 0)
    assert digest(run / "final_model") == digest(uninterrupted / "final_model")
    assert rows_by_step(tmp_path / "rows.jsonl") == rows_by_step(uninterrupted.parent / "rows.jsonl")
    block = stage(run)
    assert (block["status"], block["totals"]["steps"]) == ("finished", STEPS)
    assert block["totals"]["tokens"] == STEPS * ROWS * 32
    assert [r["step"] for r in block["history"] if "loss" in r] == list(range(1, STEPS + 1))


SHORT = ("--max_steps", 4, "--save_total_limit", 1, "--eval_steps", 4)
"""A run short enough to kill at every moment: two saves, one of which deletes the other, and a final model."""


@pytest.fixture(scope="module")
def short(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, base: Path, corpus: Path, cache_dir: Path) -> Path:
    """The short run to its end, and ``run.events``: every file that it touched, in order."""
    out = tmp_path_factory.mktemp("short")
    flags = run_flags(base, corpus, cache_dir, out)
    ended = zygote.run(*flags, *SHORT, fault=("die_at", 0, str(out / "run")))
    assert ended.returncode == 0, ended.stderr
    return out / "run"


def moments(events: Path) -> list[int]:
    """Numbers of the file events from the first save to the end, 1 for the first of all."""
    lines = events.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if ".tmp-checkpoint-2" in line)
    return list(range(first + 1, len(lines) + 1))


def try_moment(zygote: Zygote, flags: list[str], out: Path, short: Path, moment: int) -> None:
    """Kill a run at a moment and check the files; the same command must then have the uninterrupted run's result."""
    run = out / "run"
    flags = [*flags, "--base_output_dir", str(out)]
    assert zygote.run(*flags, *SHORT, fault=("die_at", moment, str(run))).returncode == KILLED
    seen = (out / "run.events").read_text().splitlines()
    assert len(seen) == moment - 1
    committed = sum(bool(re.match(r"os.rename .*\.tmp-checkpoint-\d+ ", line)) for line in seen)
    assert complete_steps(run)[-1:] == [2 * committed][: bool(committed)], seen[-1]
    assert not (run / "final_model").exists() or digest(run / "final_model") == digest(short / "final_model")
    left = {p.name for p in (run / "checkpoints").iterdir()} - {"checkpoint-2", "checkpoint-4"}
    assert all(name.startswith(".tmp-checkpoint-") for name in left)
    stage(run)  # valid JSON
    again = zygote.run(*flags, *SHORT)
    assert again.returncode == 0, again.stderr
    assert digest(run / "final_model") == digest(short / "final_model"), seen[-1]
    assert complete_steps(run)[-1] == 4
    assert not list(run.rglob(".tmp-*")), seen[-1]
    assert (stage(run)["status"], stage(run)["totals"]["steps"]) == ("finished", 4)


def test_killed_while_it_saves_prunes_or_exports(
    zygote: Zygote, flags: list[str], short: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Rows 2, 3 and the last half of 36: some moments by default, every one with --faults."""
    all_moments = moments(short.parent / "run.events")
    assert len(all_moments) > 80
    some = random.Random(SEED).sample(all_moments, 5)
    for moment in all_moments if request.config.getoption("--faults") else some:
        try_moment(zygote, flags, tmp_path / str(moment), short, moment)


@pytest.mark.faults
def test_killed_between_the_stages(
    zygote: Zygote, flags: list[str], base: Path, short: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """Row 36: at each moment from the start of stage 2 to its first checkpoint."""
    at = flags.index("--model_name_or_path")
    stage2 = [*flags[:at], *flags[at + 2 : flags.index("--no_rope_layers")], *SHORT, "--stage", "2"]

    def out_with_stage1(name: str) -> Path:
        shutil.copytree(short, tmp_path / name / "run")
        return tmp_path / name

    uninterrupted = out_with_stage1("whole")
    fault = ("die_at", 0, str(uninterrupted / "run"))
    assert zygote.run(*stage2, "--base_output_dir", uninterrupted, fault=fault).returncode == 0
    events = (uninterrupted / "run.events").read_text().splitlines()
    first_save = next(i for i, line in enumerate(events) if ".tmp-checkpoint-2" in line)
    for moment in range(1, first_save + 2):
        with subtests.test(events[moment - 1], moment=moment):
            out = out_with_stage1(str(moment))
            fault = ("die_at", moment, str(out / "run"))
            assert zygote.run(*stage2, "--base_output_dir", out, fault=fault).returncode == KILLED
            again = zygote.run(*stage2, "--base_output_dir", out)
            assert again.returncode == 0, again.stderr
            assert digest(out / "run" / "final_model") == digest(uninterrupted / "run" / "final_model")
            assert digest(out / "run" / "stage1" / "final_model") == digest(short / "final_model")
            assert stage(out / "run", 1)["status"] == stage(out / "run", 2)["status"] == "finished"
