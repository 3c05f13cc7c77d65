"""Deaths of the processes behind streamed rows: one error, no hang, and nothing is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flare.data.streaming.rows import StreamedRows
from flare.errors import EnvError
from tests.data.streams import ALONE, STEP_ROWS, children, read, rows_of, stream_of, wait_for_end
from tests.data.test_token_cache import is_alive
from tests.processes import REPO, script_environment


def test_a_killed_worker_is_one_error_and_no_hang(started: StreamedRows, tmp_path: Path) -> None:
    started.rows(0, 4)
    workers = children(started.source.child.process.pid)
    os.kill(int(workers[0]), signal.SIGKILL)
    with pytest.raises(
        EnvError, match=rf"a tokenising worker \(pid {workers[0]}\) was ended by SIGKILL .*continues from it"
    ):
        read(started, 0, 100_000, 10)
    started.close()
    assert not any(is_alive(pid) for pid in workers)
    assert list((tmp_path / "streaming").glob("*/")) == []


def test_a_killed_producer_is_one_error_and_its_workers_end(started: StreamedRows) -> None:
    started.rows(0, 4)
    producer = started.source.child.process
    workers = children(producer.pid)
    producer.kill()
    with pytest.raises(EnvError, match=rf"tokenises ahead \(pid {producer.pid}\) was ended by SIGKILL"):
        read(started, 0, 100_000, 10)
    wait_for_end(workers)


READER = """
import sys
from pathlib import Path
from tests.data import streams as t
folder, base, cache = map(Path, sys.argv[1:])
rows = t.rows_of(t.stream_of(folder, base, cache), cache)
rows.start(t.ALONE, None, t.STEP_ROWS)
rows.rows(0, 4)
print(rows.source.child.process.pid, rows.source.directory, flush=True)
sys.stdin.read()
"""


def test_nothing_of_a_killed_reader_is_left(folder: Path, base: Path, tmp_path: Path) -> None:
    """Its producer sees that it is gone; when the producer is killed, too, the next start clears the window."""
    for also_producer in (False, True):
        reader = subprocess.Popen(
            [sys.executable, "-c", READER, str(folder), str(base), str(tmp_path)], cwd=REPO,
            env=script_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        producer, directory = reader.stdout.readline().split()
        if also_producer:
            os.kill(int(producer), signal.SIGSTOP)  # so that it cannot clear up before it is killed
        reader.kill()
        reader.wait()
        reader.stdin.close()
        reader.stdout.close()
        if also_producer:
            os.kill(int(producer), signal.SIGKILL)
        wait_for_end([producer])
        assert Path(directory).exists() == also_producer
    rows = rows_of(stream_of(folder, base, tmp_path), tmp_path)
    rows.start(ALONE, None, STEP_ROWS)
    assert not Path(directory).exists()
    rows.close()


def test_a_window_in_use_is_left_alone(started: StreamedRows, folder: Path, base: Path, tmp_path: Path) -> None:
    other = rows_of(stream_of(folder, base, tmp_path), tmp_path)
    other.start(ALONE, None, STEP_ROWS)
    assert np.array_equal(read(other, 0, 40, 4), read(started, 0, 40, 4))
    other.close()


# -- errors -------------------------------------------------------------------------------------------------------
