"""What the rows of the fault matrix share: runs as processes, and the oracles that are asked after each.

The oracles of shared/FAULTS.md: (a) the final weights are the uninterrupted run's, bit for bit; (b) every row was
consumed once; (c) no complete checkpoint was lost; (d) training_metrics.json says truly how the run ended; (e) no
traceback; (f) no process left behind.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from flare.checkpoint import list_checkpoints
from tests.conftest import REPO, script_environment

STEPS = 8
SAVE_EVERY = 2
ROWS = 2
"""Of a step."""


@dataclass
class Ended:
    """A run that is over."""

    returncode: int
    stderr: str
    stdout: str

    @property
    def errors(self) -> list[str]:
        """The lines that a user reads as the error."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


class Running:
    """A run of train_qwen_multi_gpu.py as a process."""

    def __init__(self, zygote: "Zygote", pid: int, output: Path) -> None:
        self.zygote, self.pid, self.output = zygote, pid, output

    def wait_for(self, words: str, timeout_sec: float = 60) -> None:
        """Until stderr has these words."""
        wait_until(lambda: words in self.stderr(), f"the run to say {words!r}", timeout_sec)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def stderr(self) -> str:
        path = self.output.with_suffix(".err")
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait(self) -> Ended:
        """The end; with oracle (e)."""
        returncode = self.zygote.ask({"wait": self.pid})["returncode"]
        ended = Ended(returncode, self.stderr(), self.output.with_suffix(".out").read_text(errors="replace"))
        assert "Traceback" not in ended.stderr, ended.stderr
        return ended


class Zygote:
    """The process that forks runs."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.count = directory, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=script_environment(),
        )  # fmt: skip

    def ask(self, request: dict) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *flags: object, fault: tuple = (), cwd: Path = REPO, **environment: str) -> Running:
        """Start a run with these flags, in which a function of injections.py is called first."""
        self.count += 1
        output = self.directory / f"run{self.count}"
        request = {
            "argv": [str(flag) for flag in flags],
            "fault": list(fault),
            "cwd": str(cwd),
            "environment": script_environment(**environment),
            "stdout": str(output.with_suffix(".out")),
            "stderr": str(output.with_suffix(".err")),
        }
        return Running(self, self.ask(request)["pid"], output)

    def run(self, *flags: object, fault: tuple = (), **environment: str) -> Ended:
        return self.start(*flags, fault=fault, **environment).wait()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=10)


def workers(launcher: int) -> dict[int, int]:
    """Rank -> process id of a launcher's workers."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for pid in children:
        variables = dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in v)
        if "RANK" in variables:
            ranks[int(variables["RANK"])] = int(pid)
    return ranks


def wait_until(condition: object, what: str, timeout_sec: float = 60) -> None:
    """Poll; the limit only bounds a failure."""
    deadline = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_sec} s for {what}"
        time.sleep(0.02)


# -- oracles -----------------------------------------------------------------------------------------------------


def digest(model_dir: Path) -> str:
    """sha256 of a directory's weights."""
    return hashlib.sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()


def stage(run: Path, number: int = 1) -> dict:
    """The stage's block of training_metrics.json, which is valid JSON whatever happened."""
    return json.loads((run / "training_metrics.json").read_text(encoding="utf-8"))["stages"][str(number)]


def complete_steps(run: Path) -> list[int]:
    """Steps of the checkpoints whose every file is what its manifest says."""
    checkpoints = list_checkpoints(run / "checkpoints")
    for checkpoint in checkpoints:
        checkpoint.verify()
    return [checkpoint.step for checkpoint in checkpoints]


def rows_by_step(path: Path) -> dict[int, list[int]]:
    """First row number of a step -> its rows, as the last process that did this step read them (``record_rows``).

    The rows after the last step are read ahead, too; they are no part of the run.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {first: rows for first, rows in lines if first < STEPS * ROWS}
