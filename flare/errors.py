"""The errors that users see, and how scripts print them.

Each class has an exit code. A message is one line: what is wrong, the value, where, and how to fix it. Scripts print
``error: MESSAGE``; ``FLARE_DEBUG=1`` adds the traceback.
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
    """The run itself failed (exit code 5). Base class of the errors below."""

    exit_code = 5


class ConfigError(FlareError):
    """A flag, key, name or path of the user is wrong (exit code 2)."""

    exit_code = 2


class DataError(FlareError):
    """The data is missing or invalid (exit code 3)."""

    exit_code = 3


class EnvError(FlareError):
    """The machine lacks something that the run needs: driver, package, disk space (exit code 4)."""

    exit_code = 4


class CheckpointError(FlareError):
    """A checkpoint or model directory is incomplete, damaged or not made by Flare (exit code 2)."""

    exit_code = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known name closest to ``name``, or '' when none is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, or the error's class when it has no message."""
    lines = str(error).strip().splitlines()
    return without_users(lines[0][:200]) if lines else type(error).__name__


def without_users(text: str) -> str:
    """The text without the user names and passwords in its URLs."""
    return URL_USER.sub("://...@", text)


def one_line(text: str, limit: int = 160) -> str:
    """``text`` on one line of at most ``limit`` characters, without control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 8 * limit]).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def join_errors(problems: list[str]) -> str:
    """One message for several problems, numbered and one per line; a single problem stays as it is."""
    if len(problems) == 1:
        return problems[0]
    lines = "".join(f"\n  {i}. {p}" for i, p in enumerate(problems, 1))
    return f"{len(problems)} problems:{lines}"


def run_script(main: Callable[[], int]) -> int:
    """Run a script and turn errors into one line on stderr. Returns the exit code for ``sys.exit``."""
    try:
        return main()
    except FlareError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # `script | head` closed stdout, which is not an error. Redirect stdout so that the interpreter's last
        # flush does not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error} (FLARE_DEBUG=1 shows where)", EnvError.exit_code)
    except KeyboardInterrupt:
        return _interrupted()
    except ImportError as error:
        if _was_interrupted(error):  # transformers raises this for a Ctrl-C during its imports
            return _interrupted()
        raise


def _interrupted() -> int:
    print("interrupted", file=sys.stderr, flush=True)
    return 130  # the exit code that shells report after Ctrl-C


def _was_interrupted(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _fail(message: str, exit_code: int) -> int:
    """Print the error line, with ``FLARE_DEBUG=1`` after the traceback. Returns the exit code."""
    if os.environ.get("FLARE_DEBUG") == "1":
        traceback.print_exc()
    print_error(message)
    return exit_code


def print_error(message: str) -> None:
    """Print the error line on stderr. On a terminal it is folded, and its first word is red."""
    text = fold(f"error: {message}", sys.stderr).removeprefix("error:")
    print(paint("error:", "red", sys.stderr) + text, file=sys.stderr, flush=True)


MEMORY_WORDS = (
    "out of memory",
    "allocate memory",
    "bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't start new thread",
)
"""Words in the RuntimeErrors of CUDA and NCCL, of torch's CPU allocator, of C++, of cuBLAS and of Python's threads."""

_phases: list[str] = []


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
    """Context manager or decorator of a phase of the run. A phase that raised an error stays the current one."""
    depth = len(_phases)
    _phases.append(what)
    yield
    del _phases[depth:]


def while_phase() -> str:
    """The innermost current phase as the end of a sentence, ' while PHASE'; '' without a phase."""
    return f" while {_phases[-1]}" if _phases else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, or one of its causes, says that the host or a GPU ran out of memory."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None) == errno.ENOMEM:
            return True
        if isinstance(cause, RuntimeError) and any(words in str(cause) for words in MEMORY_WORDS):
            return True
        cause = cause.__cause__
    return False
