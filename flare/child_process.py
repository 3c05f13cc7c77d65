"""A process of ours with a pipe to it, for work beside the training. It is started anew, not forked."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

PACKAGE_PARENT = Path(__file__).resolve().parents[1]
HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""A tokenizer looks up words and merges all over tables of many megabytes; with pages of 2 MiB it does so a sixth
faster (docs/experiments.md). Asks the kernel by madvise; a C library or a kernel that does not know it leaves it."""


class Child:
    """``python -m MODULE FD PID`` on the other end of ``pipe``.

    Args:
        threads: of the tokenizer in it, so that all processes together fill the cores.
    """

    def __init__(self, module: str, threads: int = 1) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        with theirs:
            command = [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(os.getpid())]
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=child_environment(threads)
            )

    def tell(self, message: object) -> None:
        """Send something. That it is dead is noticed where answers are read.

        Pickled plainly: ``send`` would put a tensor, as streamed sets of ``datasets`` hold one, into shared memory
        that only children of ``multiprocessing`` can open.
        """
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send_bytes(pickle.dumps(message))

    def how_it_ended(self) -> str:
        """For people; waits for its end."""
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"(pid {self.process.pid}) {how}{hint}"


def ignore_stop_signals() -> None:
    """In a process that training reads from: a scheduler, or Ctrl-C, signals the whole group, and the training still
    has a step to finish. It ends us."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def child_environment(threads: int) -> dict[str, str]:
    """This environment with the package importable and threads set."""
    paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
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
"""prctl(2): the signal that a process gets when its parent dies."""


def end_with_parent(number: signal.Signals, parent: int | None = None) -> None:
    """Get this signal when the parent dies, killed or not.

    Args:
        parent: process id of the parent, if known: when it died before this call, this process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
