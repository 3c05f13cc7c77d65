"""The CPU: how OpenMP threads wait, the name of the processor, available memory.

Standard library only, because the wait policy must be set before torch loads OpenMP.
"""

import os
import platform
import re
from pathlib import Path


def wait_without_spinning() -> None:
    """Make OpenMP's idle threads sleep instead of spin, unless the user has set a policy.

    Spinning threads of two processes on the same cores slow each other down: next to one busy process, training ran
    at 233 tokens/s with spinning and at 5,348 without (2 cores, docs/experiments.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def processor_name() -> str:
    """Name of the processor, as the kernel reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read_available_ram(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Available memory of this machine in bytes; None when the kernel does not report it."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return int(match[1]) * 1024 if match else None
