"""What this process is doing, in words, for an error that can come at any time: memory is short. No torch."""

import contextlib
import errno
from collections.abc import Iterator

MEMORY_WORDS = (
    "out of memory",
    "allocate memory",
    "bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't start new thread",
)
"""Of the errors of CUDA and NCCL, of torch's CPU allocator, of C++, of cuBLAS and of Python's threads (for want of a
stack, or of a process number: the words are shown), all of them RuntimeError."""

_phases: list[str] = []


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
    """Around a phase, or as a decorator of its function. One that an error ended stays the current one."""
    depth = len(_phases)
    _phases.append(what)
    yield
    del _phases[depth:]


def while_phase() -> str:
    """The innermost phase that has begun and not ended, as the end of a clause; nothing when none has."""
    return f" while {_phases[-1]}" if _phases else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, of this host or of a card; also of an error that was raised from such a one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None) == errno.ENOMEM:
            return True
        if isinstance(cause, RuntimeError) and any(words in str(cause) for words in MEMORY_WORDS):
            return True
        cause = cause.__cause__
    return False
