"""Our scripts as real processes: in new interpreters, as forks of one that has the imports, as gloo ranks."""

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def script_environment(**changes: str) -> dict[str, str]:
    """The environment without what a surrounding run may have left in it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "FLARE_OUTPUT_DIR", "CUDA_VISIBLE_DEVICES", "NNODES")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    return environment | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | changes


def run_script(script: str, *flags: object, timeout: int = 240, **kwargs: object) -> subprocess.CompletedProcess:
    """Run one of our scripts to its end, in a real process without a terminal."""
    command = [sys.executable, str(REPO / script), *map(str, flags)]
    kwargs.setdefault("env", script_environment())
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, **kwargs)


def torchrun(processes: int, module: str, *arguments: object, timeout: int = 240) -> None:
    """Run a module of the tests on this number of gloo ranks (one needs no launcher); it must end without an error."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "-m", module, *map(str, arguments)],
        cwd=REPO, env=script_environment(), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def wait_until(condition: object, what: str, timeout_sec: float = 60) -> None:
    """Poll; the limit only bounds a failure."""
    deadline = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_sec} s for {what}"
        time.sleep(0.02)


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

    def wait(self, timeout_sec: float = 240) -> Ended:
        """Wait for the end, which must have no traceback. The process is killed after the limit."""
        limit = threading.Timer(timeout_sec, os.killpg, (self.pid, signal.SIGKILL))
        limit.start()
        returncode = self.zygote.ask({"wait": self.pid})["returncode"]
        limit.cancel()
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


def train_in_new_process(*flags: object, **kwargs: object) -> subprocess.CompletedProcess:
    """train_qwen_multi_gpu.py in a new interpreter, for what is said of its start."""
    return run_script("train_qwen_multi_gpu.py", *flags, **kwargs)


@functools.cache
def zygote() -> Zygote:
    """The process that forks this test process's runs. It ends with it: its requests come through a pipe."""
    directory = tempfile.mkdtemp(prefix="flare-tests-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Zygote(Path(directory))


def train(*flags: object, timeout: int = 240, cwd: Path = REPO) -> Ended:
    """train_qwen_multi_gpu.py in a process forked from one that has the imports."""
    return zygote().start(*flags, cwd=cwd).wait(timeout)
