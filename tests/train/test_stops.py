"""Runs that are killed, stopped or damaged: the next start continues them or refuses to."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import train
from tests.train.test_runs import assert_same_weights, losses, metrics, start, wait_for_line


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_run_continues_to_the_same_bits(train_flags: list[str], tmp_path: Path, processes: int) -> None:
    """With one process, it is killed itself. With two, the launcher is killed and its workers stop by themselves."""
    flags = [*train_flags, "--max_steps", 100, "--save_steps", 5, "--eval_steps", 10, "--nproc_per_node", processes]
    whole = train(*flags, "--experiment_name", "whole")
    assert whole.returncode == 0, whole.stderr
    process = start(*flags)
    wait_for_line(process, "step 17/100")
    process.kill()
    process.wait()
    run = tmp_path / "out" / "run"
    wait_until_unlocked(run)
    assert not (run / "final_model").exists()
    resumed = train(*flags)
    assert resumed.returncode == 0, resumed.stderr
    found = re.search(r"resumes from checkpoint-(\d+)", resumed.stderr)
    assert found
    assert 15 <= int(found[1]) < 100
    assert_same_weights(run / "final_model", tmp_path / "out" / "whole" / "final_model")
    assert losses(run) == losses(tmp_path / "out" / "whole")
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r] == list(range(1, 101))


def wait_until_unlocked(run: Path) -> None:
    """Workers whose launcher was killed end by themselves, and then the lock is free."""
    import fcntl

    with open(run / ".lock") as file:
        deadline = time.monotonic() + 120
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                assert time.monotonic() < deadline, "the workers of a killed launcher did not end"
                time.sleep(0.1)


@pytest.mark.parametrize("sig", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_signal_stops_cleanly_with_a_checkpoint_and_the_run_continues(
    train_flags: list[str], tmp_path: Path, sig: signal.Signals, processes: int
) -> None:
    flags = [*train_flags, "--max_steps", 400, "--eval_steps", 400, "--save_steps", 400, "--logging_steps", 5]
    process = start(*flags, "--nproc_per_node", processes)
    wait_for_line(process, "step 10/400")
    process.send_signal(sig)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 0, rest
    run = tmp_path / "out" / "run"
    assert metrics(run)["stages"]["1"]["status"] == "stopped"
    step = metrics(run)["stages"]["1"]["totals"]["steps"]
    assert 10 <= step < 400
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"checkpoint-{step}"]
    continued = train(*flags, "--max_steps", step + 2)
    assert continued.returncode == 0, continued.stderr
    assert f"resumes from checkpoint-{step}" in continued.stderr


def test_stop_file_stops_and_is_removed(train_flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "out" / "run"
    run.mkdir(parents=True)
    (run / "STOP").touch()
    result = train(*train_flags)
    assert result.returncode == 0, result.stderr
    assert metrics(run)["stages"]["1"]["status"] == "stopped"
    assert not (run / "STOP").exists()


def test_damaged_checkpoint_is_named_and_the_older_one_used(train_flags: list[str], tmp_path: Path) -> None:
    flags = [*train_flags, "--save_steps", 2]
    assert train(*flags).returncode == 0
    checkpoints = tmp_path / "out" / "run" / "checkpoints"
    with open(checkpoints / "checkpoint-6" / "model.safetensors", "r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    (checkpoints / "checkpoint-4" / "optimizer.safetensors").unlink()
    result = train(*flags, "--max_steps", 8)
    assert result.returncode == 0, result.stderr
    assert "checkpoint-6: model.safetensors is damaged" in result.stderr
    assert "checkpoint-4: optimizer.safetensors is missing" in result.stderr
    assert "resumes from checkpoint-2" in result.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--max_seq_length", "48"], "max_seq_length: 32 -> 48"),
        (["--no_rope_layers", "1"], "nope_layers: [1, 3] -> [1]"),
        (["--seed", "7"], "seed: 42 -> 7"),
        (["--per_device_train_batch_size", "3"], "global batch of 2 rows, the flags now give 3"),
    ],
)
def test_resume_with_other_settings_is_refused(
    train_flags: list[str], tmp_path: Path, changes: list[str], words: str
) -> None:
    assert train(*train_flags, "--max_steps", 1).returncode == 0
    before = (tmp_path / "out" / "run" / "final_model" / "model.safetensors").read_bytes()
    result = train(*train_flags, "--max_steps", 2, *changes)
    assert result.returncode == 2
    assert words in result.stderr
    assert (tmp_path / "out" / "run" / "final_model" / "model.safetensors").read_bytes() == before


def test_second_run_of_one_name_is_refused_with_its_holder(train_flags: list[str], tmp_path: Path) -> None:
    flags = [*train_flags, "--max_steps", 4000, "--eval_steps", 4000, "--save_steps", 4000]
    first = start(*flags)
    try:
        wait_for_line(first, "step 2/4000")
        second = train(*flags)
        assert second.returncode == 2
        assert f"is running (pid {first.pid} on " in second.stderr
    finally:
        first.send_signal(signal.SIGTERM)
        first.stderr.read()
        assert first.wait(timeout=60) == 0


def test_a_killed_rank_ends_the_run_with_its_name(train_flags: list[str], tmp_path: Path) -> None:
    flags = [*train_flags, "--max_steps", 4000, "--eval_steps", 4000, "--save_steps", 5, "--nproc_per_node", 2]
    process = start(*flags)
    wait_for_line(process, "step 8/4000")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    victim = next(pid for pid in children if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(victim), signal.SIGKILL)
    rest = process.stderr.read()
    assert process.wait(timeout=90) == 5
    assert "error: rank 1 was ended by SIGKILL" in rest
    run = tmp_path / "out" / "run"
    assert metrics(run)["stages"]["1"]["status"] == "failed"
    assert "rank 1 was ended by SIGKILL" in (run / "training.log").read_text()
