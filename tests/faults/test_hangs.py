"""Ranks that stop answering, launchers that are killed, saves that are merely slow (rows 27-29 and 47)."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.faults.harness import complete_steps, stage, workers
from tests.processes import Ended, Zygote


def test_a_hanging_process_is_ended_with_its_stacks(zygote: Zygote, flags: list[str], run: Path) -> None:
    ended = zygote.run(*flags, "--step_timeout", 1, fault=("hang_in_step", 6))
    assert ended.returncode == 5
    (error,) = ended.errors
    assert "step 6 did not end within 1 s: rank 0 is in loader.py:" in error
    assert stage(run)["status"] == "failed"
    assert stage(run)["error"] in error
    stacks = (run / "logs" / "stacks-rank0.txt").read_text()
    assert "in hanging" in stacks
    assert "flare/train/trainer.py" in stacks
    assert "did not end within" in (run / "training.log").read_text()
    assert complete_steps(run) == [2, 4]
    again = zygote.run(*flags)
    assert again.returncode == 0, again.stderr
    assert not list((run / "logs").glob("stacks-*"))


@pytest.mark.parametrize("slow", ["slow_save", "slow_evaluation"])
def test_a_slow_save_or_evaluation_is_not_a_hang(zygote: Zygote, flags: list[str], slow: str) -> None:
    """Row 47, one process; tests of several processes follow."""
    ended = zygote.run(*flags, "--step_timeout", 0.5, "--max_steps", 4, fault=(slow, 1))
    assert ended.returncode == 0, ended.stderr


# -- several processes -------------------------------------------------------------------------------------------


def assert_reported_with_stacks(ended: Ended, run: Path, pids: dict[int, int]) -> None:
    assert ended.returncode == 5
    assert stage(run)["error"] in ended.errors[0]
    for rank, pid in pids.items():
        assert "flare/train/trainer.py" in (run / "logs" / f"stacks-rank{rank}.txt").read_text()
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_all_end(zygote: Zygote, flags: list[str], run: Path, rank: int) -> None:
    """Row 28."""
    long = ("--max_steps", 100_000, "--eval_steps", 100_000, "--save_steps", 100_000)
    running = zygote.start(*flags, *long, "--nproc_per_node", 2, "--step_timeout", 4)
    running.wait_for("step 8/")
    pids = workers(running.pid)
    os.kill(pids[rank], signal.SIGSTOP)
    t0 = time.monotonic()
    ended = running.wait()
    assert time.monotonic() - t0 < 60, ended.stderr
    assert len(ended.errors) == 1, (ended.returncode, ended.stderr)
    (error,) = ended.errors
    assert re.search(
        rf"step \d+ did not end within 4 s: rank {rank} \(pid {pids[rank]} on .*\) does not answer", error
    )
    assert_reported_with_stacks(ended, run, pids)


@pytest.mark.faults
def test_a_rank_that_is_stopped_while_it_saves_is_named(zygote: Zygote, flags: list[str], run: Path) -> None:
    """The others would wait 12 hours for a slow save; this one writes no heartbeat."""
    fault = ("in_workers", "slow_save", 1000)
    running = zygote.start(*flags, "--nproc_per_node", 2, "--ddp_timeout", 10, fault=fault)
    running.wait_for("step 2/")
    pids = workers(running.pid)
    os.kill(pids[0], signal.SIGSTOP)
    ended = running.wait()
    (error,) = ended.errors
    assert re.search(rf"no heartbeat for 9 s: rank 0 \(pid {pids[0]} on .*\) does not answer", error)
    assert_reported_with_stacks(ended, run, pids)


@pytest.mark.faults
def test_a_rank_that_never_ends_a_step_is_named_but_not_those_that_wait(
    zygote: Zygote, flags: list[str], run: Path
) -> None:
    fault = ("in_workers", "hang_in_step", 6, 1)
    ended = zygote.run(*flags, "--nproc_per_node", 2, "--step_timeout", 4, fault=fault)
    assert ended.returncode == 5
    (error,) = ended.errors
    assert re.search(r"step 6 did not end within 4 s: rank 1 is in loader\.py:\d+ \(\w+\);", error)
    assert "in hanging" in (run / "logs" / "stacks-rank1.txt").read_text()


@pytest.mark.faults
def test_an_evaluation_slower_than_the_limits_is_not_a_hang(zygote: Zygote, flags: list[str], run: Path) -> None:
    assert_no_hang(zygote, flags, run, "slow_evaluation", 7)


@pytest.mark.faults
def test_a_slow_save_of_rank_0_is_not_a_hang_of_the_others(zygote: Zygote, flags: list[str], run: Path) -> None:
    """Row 47: slower than the steps' and the collectives' limits."""
    assert_no_hang(zygote, flags, run, "slow_save", 8)


def assert_no_hang(zygote: Zygote, flags: list[str], run: Path, *fault: object) -> None:
    """Two ranks finish whatever the fault delays beyond their limits."""
    limits = ("--step_timeout", 2, "--ddp_timeout", 6)
    ended = zygote.run(*flags, "--nproc_per_node", 2, "--max_steps", 2, *limits, fault=("in_workers", *fault))
    assert ended.returncode == 0, ended.stderr
    assert complete_steps(run) == [2]
