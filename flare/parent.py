"""A process that must not outlive the one that started it. Standard library only.

Linux tells a child that its parent died; elsewhere a child finds out at its next read from the parent.
"""

import ctypes
import os
import signal
import sys

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
