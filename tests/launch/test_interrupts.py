"""The first Ctrl-C stops with a checkpoint, the second one at once."""

import os
import signal
import time
from pathlib import Path

from tests.train.test_runs import metrics, start, wait_for_line


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_first_interrupt_stops_with_a_checkpoint(train_flags: list[str], tmp_path: Path) -> None:
    flags = [*train_flags, "--max_steps", 4000, "--eval_steps", 4000, "--save_steps", 4000, "--nproc_per_node", 2]
    process = start(*flags)
    wait_for_line(process, "step 3/4000")
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 0, rest
    assert (
        rest.count("Ctrl-C: the run stops after this step, with a checkpoint; a second Ctrl-C stops it at once") == 1
    )
    run = tmp_path / "out" / "run"
    assert metrics(run)["stages"]["1"]["status"] == "stopped"
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_second_interrupt_ends_launcher_and_workers_at_once(train_flags: list[str], tmp_path: Path) -> None:
    process = start(*train_flags, "--max_steps", 4000, "--eval_steps", 4000, "--nproc_per_node", 2)
    wait_for_line(process, "step 3/4000")
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGSTOP)  # a worker that hangs: the first interrupt cannot end it
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    process.stderr.read()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.1)
