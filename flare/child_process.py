"""A child process with a pipe, for work that runs next to training. It is started fresh, not forked."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys

from flare.files import REPO

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""A tokenizer reads random places of tables of many megabytes. Pages of 2 MiB make it one sixth faster
(docs/experiments.md). glibc requests them with madvise; other C libraries and old kernels ignore the setting."""


class Child:
    """A process ``python -m MODULE FD PID``, connected by ``pipe``.

    Args:
        threads: number of tokenizer threads in the process.
    """

    def __init__(self, module: str, threads: int = 1) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        with theirs:
            command = [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(os.getpid())]
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=child_environment(threads)
            )

    def send(self, message: object) -> None:
        """Send a message. A dead process is detected where its answers are read.

        The message is pickled here, because ``Connection.send`` would put a tensor (streamed ``datasets`` contain one)
        into shared memory that only children of ``multiprocessing`` can open.
        """
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send_bytes(pickle.dumps(message))

    def describe_exit(self) -> str:
        """Wait for the process to end, and describe how it ended, for an error message."""
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"(pid {self.process.pid}) {how}{hint}"


def ignore_stop_signals() -> None:
    """Ignore stop signals in a process that training reads from.

    A scheduler or Ctrl-C signals the complete process group, but training still has a step to finish. It ends this
    process afterwards.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def child_environment(threads: int) -> dict[str, str]:
    """The environment for a child process: the package importable, huge pages, numbers of threads."""
    paths = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    tunables = list(filter(None, [os.environ.get("GLIBC_TUNABLES")]))
    if not any(HUGE_PAGES.split("=")[0] in text for text in tunables):
        tunables.append(HUGE_PAGES)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "GLIBC_TUNABLES": ":".join(tunables),
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
        "OPENBLAS_NUM_THREADS": "1",
    }


PR_SET_PDEATHSIG = 1
"""prctl(2) option: the signal that a process receives when its parent dies."""


def end_with_parent(number: signal.Signals, parent: int | None = None) -> None:
    """Make this process receive a signal when its parent ends for any reason. Linux only.

    Args:
        parent: process id of the parent, if known. If the parent ended before this call, this process exits here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
