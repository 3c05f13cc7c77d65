"""What users see when something is wrong. Imports only how a terminal shows it.

Every error carries the exit code of its kind (contract, section 8) and a message of one line:
what, the value, where, and the way out. Scripts print ``error: MESSAGE`` and no traceback, unless
``FLARE_DEBUG=1`` asks for one.
"""

import contextlib
import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

from flare.terminal import fold, paint

URL_USER = re.compile(r"://[^/@\s]+@")


class FlareError(Exception):
    """The run itself failed (exit code 5), or a more exact kind below."""

    exit_code = 5


class ConfigError(FlareError):
    """The user asked for something that cannot be: a flag, a key, a name, a path (exit code 2)."""

    exit_code = 2


class DataError(FlareError):
    """The data cannot be had or is not what it should be (exit code 3)."""

    exit_code = 3


class EnvError(FlareError):
    """The machine does not offer what the run needs: driver, packages, disk (exit code 4)."""

    exit_code = 4


class CheckpointError(FlareError):
    """A checkpoint or model directory is incomplete, damaged or not ours (exit code 2)."""

    exit_code = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known name closest to ``name``, or '' when none is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def first_line(error: BaseException) -> str:
    """What another library's error says, as a part of one line; its kind when it says nothing."""
    lines = str(error).strip().splitlines()
    return without_users(lines[0][:200]) if lines else type(error).__name__


def without_users(text: str) -> str:
    """The text with the users and passwords in its URLs, of a mirror or a proxy, left out."""
    return URL_USER.sub("://...@", text)


def one_line(text: str, limit: int = 160) -> str:
    """``text`` of another program or person, fit for one line of an error: no control characters, cut."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 8 * limit]).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def join_errors(problems: list[str]) -> str:
    """One message of several problems: alone as it is, else numbered, one a line."""
    if len(problems) == 1:
        return problems[0]
    lines = "".join(f"\n  {i}. {p}" for i, p in enumerate(problems, 1))
    return f"{len(problems)} problems:{lines}"


def run_script(main: Callable[[], int]) -> int:
    """Run a script's body and turn errors into one line on stderr and an exit code.

    Returns the code for ``sys.exit``. ``FLARE_DEBUG=1`` prints the traceback as well.
    """
    try:
        return main()
    except FlareError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # `script | head` closed our stdout: not an error of the run. Point stdout elsewhere, so that
        # the interpreter's last flush does not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error} (FLARE_DEBUG=1 shows where)", EnvError.exit_code)
    except KeyboardInterrupt:
        return _interrupted()
    except ImportError as error:
        if _was_interrupted(error):  # transformers turns a Ctrl-C during its imports into this
            return _interrupted()
        raise


def _interrupted() -> int:
    print("interrupted", file=sys.stderr, flush=True)
    return 130  # what shells say of a process that Ctrl-C ended


def _was_interrupted(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _fail(message: str, exit_code: int) -> int:
    """Print the line, after the traceback when one is asked for; returns the code."""
    if os.environ.get("FLARE_DEBUG") == "1":
        traceback.print_exc()
    print_error(message)
    return exit_code


def print_error(message: str) -> None:
    """The one line on stderr; on a terminal folded to its width, and the first word red."""
    text = fold(f"error: {message}", sys.stderr).removeprefix("error:")
    print(paint("error:", "red", sys.stderr) + text, file=sys.stderr, flush=True)


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
    """Whether memory was short, of this host or of a GPU; also of an error that was raised from such a one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None) == errno.ENOMEM:
            return True
        if isinstance(cause, RuntimeError) and any(words in str(cause) for words in MEMORY_WORDS):
            return True
        cause = cause.__cause__
    return False
