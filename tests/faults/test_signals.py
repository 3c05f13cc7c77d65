"""Signals at inconvenient moments, and several at once (rows 5, 6 and 7 of the matrix)."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import STEPS, complete_steps, digest, stage, workers
from tests.processes import Running, Zygote, wait_until

LONG = ("--max_steps", 100_000, "--eval_steps", 100_000, "--save_steps", 100_000)
PAUSED = 4
"""The step whose checkpoint is being written when the signals come."""


def send_until_it_ends(running: Running, number: int) -> None:
    """Repeatedly, because of two signals at the same time a process receives one."""

    def ended() -> bool:
        running.send(number)
        time.sleep(0.1)
        return Path(f"/proc/{running.pid}/stat").read_text().rpartition(") ")[2].startswith("Z")

    wait_until(ended, "the run to end")


def assert_gone(pids: dict[int, int]) -> None:
    """A killed process disappears when its new parent has reaped it."""
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), "the workers' end")


@pytest.fixture
def in_save(zygote: Zygote, flags: list[str], tmp_path: Path) -> Callable[..., Running]:
    """Starts a run and returns it while it writes the checkpoint of step PAUSED, for this many seconds."""

    def start(seconds: float, processes: int = 1) -> Running:
        marker = tmp_path / "in-the-save"
        fault = ("pause_in_save", PAUSED, str(marker), seconds)
        if processes > 1:
            fault = ("in_workers", *fault)
        running = zygote.start(*flags, "--nproc_per_node", processes, fault=fault)
        wait_until(marker.exists, "the save")
        return running

    return start


def test_signals_during_a_save_wait_for_it(
    zygote: Zygote, in_save: Callable[..., Running], flags: list[str], run: Path, uninterrupted: Path
) -> None:
    """Row 6: a second SIGTERM, as schedulers send, changes nothing."""
    running = in_save(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        running.send(number)
        time.sleep(0.2)
    ended = running.wait()
    assert ended.returncode == 0, ended.stderr
    assert (stage(run)["status"], complete_steps(run)[-1]) == ("stopped", PAUSED + 1)
    assert not (run / "final_model").exists()
    assert zygote.run(*flags).returncode == 0
    assert digest(run / "final_model") == digest(uninterrupted / "final_model")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_insists_ends_the_save_and_keeps_the_checkpoint_before(
    zygote: Zygote,
    in_save: Callable[..., Running],
    flags: list[str],
    run: Path,
    uninterrupted: Path,
    number: signal.Signals,
) -> None:
    """Row 6: the second Ctrl-C, the third of other signals."""
    running = in_save(1000)
    if number == signal.SIGINT:
        running.send(number)
        time.sleep(0.2)
        running.send(number)
    else:
        send_until_it_ends(running, number)
    ended = running.wait()
    assert ended.returncode == 130
    assert ended.stderr.endswith("interrupted\n")
    assert ended.stderr.count("a second Ctrl-C stops it at once") == (number == signal.SIGINT)
    assert stage(run)["status"] == "failed"
    assert f"stopped at once by signal {2 if number == signal.SIGINT else 3} ({number.name})" in stage(run)["error"]
    assert complete_steps(run) == [PAUSED - 2]
    assert zygote.run(*flags).returncode == 0
    assert digest(run / "final_model") == digest(uninterrupted / "final_model")
    assert not list(run.rglob(".tmp-*"))


def test_a_stop_keeps_the_best_and_the_newest(zygote: Zygote, flags: list[str], run: Path) -> None:
    """Row 7: one checkpoint is to be kept, and an older one is the best: at this rate none gains enough."""
    patience = ("--early_stopping_patience", 1000, "--early_stopping_threshold", 100)
    settings = (*LONG, "--eval_steps", 2, "--save_steps", 2, "--save_total_limit", 1, "--learning_rate", 1e-12)
    running = zygote.start(*flags, *settings, *patience)
    running.wait_for("step 7/")
    running.send(signal.SIGTERM)
    ended = running.wait()
    assert ended.returncode == 0, ended.stderr
    block = stage(run)
    assert (block["status"], block["best"]["step"]) == ("stopped", 0)
    assert complete_steps(run) == [0, block["totals"]["steps"]]
    again = zygote.run(*flags, *settings, "--early_stopping_patience", 1, "--early_stopping_threshold", 100)
    assert again.returncode == 0, again.stderr
    assert "final model: the weights of step 0" in again.stderr
    assert digest(run / "final_model") == digest(run / "checkpoints" / "checkpoint-0")


# -- several processes --------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    zygote: Zygote, flags: list[str], run: Path, rank: int, number: signal.Signals
) -> None:
    """Row 5."""
    running = zygote.start(*flags, *LONG, "--nproc_per_node", 2)
    running.wait_for("step 8/")
    pids = workers(running.pid)
    os.kill(pids[rank], number)
    ended = running.wait()
    assert ended.returncode == 0, ended.stderr
    block = stage(run)
    assert block["status"] == "stopped"
    assert complete_steps(run) == [block["totals"]["steps"]]
    assert not (run / "final_model").exists()
    assert_gone(pids)
    again = zygote.run(*flags, *LONG, "--nproc_per_node", 2, "--max_steps", block["totals"]["steps"] + 2)
    assert again.returncode == 0, again.stderr
    assert f"resumes from checkpoint-{block['totals']['steps']}" in again.stderr
    steps = [record["step"] for record in stage(run)["history"] if "loss" in record]
    assert steps == list(range(1, block["totals"]["steps"] + 3))


@pytest.mark.faults
def test_two_signals_to_a_launcher_wait_for_the_save(in_save: Callable[..., Running], run: Path) -> None:
    """Row 6."""
    running = in_save(3, processes=2)
    pids = workers(running.pid)
    for _ in range(2):
        running.send(signal.SIGTERM)
        time.sleep(0.2)
    ended = running.wait()
    assert ended.returncode == 0, ended.stderr
    assert (stage(run)["status"], complete_steps(run)[-1]) == ("stopped", PAUSED + 1)
    assert_gone(pids)


@pytest.mark.faults
def test_a_third_signal_to_a_launcher_ends_all_at_once(
    zygote: Zygote, in_save: Callable[..., Running], flags: list[str], run: Path
) -> None:
    """Row 6."""
    running = in_save(1000, processes=2)
    pids = workers(running.pid)
    send_until_it_ends(running, signal.SIGTERM)
    assert running.wait().returncode == 128 + signal.SIGTERM
    assert_gone(pids)
    assert (stage(run)["status"], complete_steps(run)) == ("failed", [PAUSED - 2])
    again = zygote.run(*flags, "--nproc_per_node", 2)
    assert again.returncode == 0, again.stderr
    assert (stage(run)["status"], complete_steps(run)[-1]) == ("finished", STEPS)
