"""A run reads the same rows for any number of processes and after any kill, with cached and with streamed rows.

Each run is the real script and records its rows (``tests/data/record_rows.py``). Kills are SIGKILL.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import write_corpus
from tests.data.streams import children, wait_for_end
from tests.processes import REPO, script_environment
from tests.train.test_runs import assert_same_weights

STEPS, ROWS = 26, 12
"""Steps of a run, and rows per step."""
STREAMING = ["--streaming", "--streaming_buffer_rows", "60"]
Reading = dict[int, list[tuple[int, str]]]
"""Step -> (row, hash of its tokens), by position."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of about a hundred rows of 32 tokens. A run reads more than two epochs."""
    return write_corpus(tmp_path_factory.mktemp("small") / "small.jsonl", 22)


class Runs:
    """Consecutive runs of one experiment."""

    def __init__(self, base: Path, corpus: Path | str, directory: Path, extra: list[str]) -> None:
        self.directory, self.attempts = directory, 0
        directory.mkdir(exist_ok=True)
        self.flags = [
            "--gpu_type", "cpu", "--model_name_or_path", str(base), "--dataset_name", str(corpus), "--cache_dir",
            str(directory / "cache"), "--base_output_dir", str(directory), "--experiment_name", "run",
            "--max_seq_length", "32", "--max_steps", str(STEPS), "--eval_steps", "1000", "--logging_steps", "1",
            "--save_steps", "3", "--validation_split_percentage", "10", "--learning_rate", "1e-3",
            "--no_rope_layers", "1", "3", "--global_batch_size", str(ROWS), *extra,
        ]  # fmt: skip

    @property
    def final_model(self) -> Path:
        return self.directory / "run" / "final_model"

    def start(self, processes: int = 1, micro: int = 2) -> subprocess.Popen:
        self.attempts += 1
        runner = [sys.executable, "-m"]
        if processes > 1:
            runner += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
        record = str(self.directory / f"rows-{self.attempts:02d}")
        flags = [*self.flags, "--per_device_train_batch_size", str(micro)]
        return subprocess.Popen(
            [*runner, "tests.data.record_rows", record, *flags], cwd=REPO, env=script_environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def finish(self, processes: int = 1, micro: int = 2) -> None:
        _, errors = (process := self.start(processes, micro)).communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]

    def kill_after(self, step: int, processes: int = 1, micro: int = 2) -> None:
        """Kill all of its processes, including the producer, after a step was logged."""
        process = self.start(processes, micro)
        assert any(f"step {step}/{STEPS} |" in line for line in process.stderr), f"no step {step}"
        pids = [process.pid, *descendants(process.pid)]
        for pid in pids:  # parents first, so that none sees another end and cleans up
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.stderr.close()
        process.wait()
        wait_for_end([str(pid) for pid in pids])

    def reading(self) -> Reading:
        """For each step, the rows of the last attempt that reached it. Every attempt must read complete steps."""
        found: Reading = {}
        for attempt in range(1, self.attempts + 1):
            by_step: dict[int, list] = {}
            for file in self.directory.glob(f"rows-{attempt:02d}.*"):
                for line in file.read_text().splitlines():
                    with contextlib.suppress(ValueError):  # cut off by the kill
                        entry = json.loads(line)
                        pairs = list(zip(entry["rows"], entry["digests"], strict=True))
                        by_step.setdefault(entry["step"], []).append((entry["first"], pairs))
            found |= {step: in_order(parts) for step, parts in by_step.items()}
        return found


def in_order(parts: list[tuple[int, list]]) -> list[tuple[int, str]]:
    """The rows of a step by position, joined from all ranks."""
    return [pair for _, pairs in sorted(parts, key=lambda part: part[0]) for pair in pairs]


def descendants(pid: int) -> list[int]:
    """All descendants of a process, parents first."""
    found = [int(child) for child in children(pid)]
    return found + [below for child in found for below in descendants(child)]


@pytest.fixture(scope="module", params=["cached", "streamed"])
def extra(request: pytest.FixtureRequest) -> list[str]:
    return STREAMING if request.param == "streamed" else []


@pytest.fixture(scope="module")
def uninterrupted(base: Path, small: Path, extra: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One process, not interrupted."""
    runs = Runs(base, small, tmp_path_factory.mktemp("uninterrupted"), extra)
    runs.finish()
    return runs


def test_no_row_is_lost_or_repeated_in_two_epochs(uninterrupted: Runs) -> None:
    """Each of the first two epochs reads every row once. The number of rows is taken from the recorded rows."""
    pairs = [pair for _, step in sorted(uninterrupted.reading().items()) for pair in step]
    assert len(pairs) == STEPS * ROWS
    tokens = [digest for _, digest in pairs]
    rows = len(set(tokens))
    assert 50 < rows < STEPS * ROWS / 2
    first, second = tokens[:rows], tokens[rows : 2 * rows]
    assert len(set(first)) == rows
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize(
    ("processes", "micro"),
    [
        (2, 1),
        pytest.param(3, 2, marks=pytest.mark.slow),
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(4, 3, marks=pytest.mark.slow),
        pytest.param(1, 12, marks=pytest.mark.slow),
    ],
)
def test_processes_and_accumulation_read_the_same_rows(
    uninterrupted: Runs, base: Path, small: Path, extra: list[str], tmp_path: Path, processes: int, micro: int
) -> None:
    runs = Runs(base, small, tmp_path / "runs", extra)
    runs.finish(processes, micro)
    assert runs.reading() == uninterrupted.reading()


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_points_reads_the_same_rows_to_the_same_weights(
    uninterrupted: Runs, base: Path, small: Path, extra: list[str], tmp_path: Path, kills: int
) -> None:
    runs = Runs(base, small, tmp_path / "runs", extra)
    for step in sorted(random.Random(kills).sample(range(2, STEPS - 1), kills)):
        runs.kill_after(step)
    runs.finish()
    assert runs.reading() == uninterrupted.reading()
    assert_same_weights(runs.final_model, uninterrupted.final_model)


@pytest.mark.slow
def test_a_run_killed_on_two_one_and_three_processes_reads_the_same_rows(
    uninterrupted: Runs, base: Path, small: Path, extra: list[str], tmp_path: Path
) -> None:
    """With different gradient accumulation each time. The weights differ only by rounding."""
    runs = Runs(base, small, tmp_path / "runs", extra)
    runs.kill_after(7, processes=2, micro=1)
    runs.kill_after(16, processes=1, micro=3)
    runs.finish(processes=3, micro=2)
    assert runs.reading() == uninterrupted.reading()
    assert_same_weights(runs.final_model, uninterrupted.final_model, relative=1e-3)
