"""How CPU threads wait. Standard library only: it must be settled before torch loads OpenMP."""

import os


def wait_without_spinning() -> None:
    """Let OpenMP's idle threads sleep instead of spin, unless the user chose otherwise.

    Spinning threads of two processes on the same cores starve each other: beside one busy process a training
    step ran at 233 tokens/s with spinning and at 5,348 without (2 cores, docs/experiments.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
