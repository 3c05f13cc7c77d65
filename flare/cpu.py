"""CPU threads: how they wait, and on which processor.

Standard library only: how they wait must be settled before torch loads OpenMP.
"""

import os
import platform
import re
from pathlib import Path


def wait_without_spinning() -> None:
    """Let OpenMP's idle threads sleep instead of spin, unless the user chose otherwise.

    Spinning threads of two processes on the same cores starve each other: beside one busy process a training
    step ran at 233 tokens/s with spinning and at 5,348 without (2 cores, docs/experiments.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def processor_name() -> str:
    """The processor as the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read_available_ram(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that programs can still take on this machine; None where the kernel does not say."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return int(match[1]) * 1024 if match else None
