"""Pass a worker's error to the launcher through a file that torchrun names. The launcher prints the first one."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from flare.child_process import end_with_parent
from flare.launch.worker_environment import DEVICE_VARIABLE

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"


def stop_when_launcher_dies() -> None:
    """In a worker: receive SIGTERM when the launcher dies, and so stop with a checkpoint. Linux only."""
    if DEVICE_VARIABLE in os.environ and ERROR_FILE_VARIABLE in os.environ:
        end_with_parent(signal.SIGTERM)


def report_to_launcher(message: str, exit_code: int) -> bool:
    """In a worker: write the error to a file for the launcher. Returns False without a launcher of Flare."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if not path or DEVICE_VARIABLE not in os.environ:
        return False
    content = {"message": {"message": message, "exit_code": exit_code, "extraInfo": {"timestamp": int(time.time())}}}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Failure:
    """The error of the worker that failed first. ``is_reported``: the message comes from a worker."""

    rank: int
    message: str
    exit_code: int
    is_reported: bool


def first_failure(error: object, logs: Path | str, error_files: Path | None = None) -> Failure:
    """The error to print when workers failed.

    Args:
        error: torchrun's ChildFailedError.
        logs: the logs of the run, named in the message when no worker reported an error.
        error_files: torchrun's directory of error files. It is searched when the worker that failed first wrote none.
    """
    rank, failure = error.get_first_failure()
    reported = _read_error(failure.error_file) or (_read_any_error(error_files) if error_files else None)
    if reported:
        return Failure(rank, reported["message"], reported["exit_code"], True)
    # A killed worker comes before workers that ended because they waited for it.
    rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
    if failure.exitcode < 0:
        hint = "; the kernel does this when memory is short, see dmesg" if failure.exitcode == -signal.SIGKILL else ""
        message = f"rank {rank} was ended by {failure.signal_name()} (pid {failure.pid}){hint}"
        return Failure(rank, message, 5, False)
    return Failure(rank, f"rank {rank} failed with exit code {failure.exitcode}; see {logs}", 5, False)


def _read_any_error(error_files: Path) -> dict | None:
    """The error of any worker of this node, such as the one whose watchdog ended a rank that hung."""
    return next((found for file in error_files.rglob("error.json") if (found := _read_error(str(file)))), None)


def _read_error(path: str | None) -> dict | None:
    """The message and exit code in an error file; None when there are none."""
    try:
        content = json.loads(Path(path or "").read_text(encoding="utf-8"))["message"]
        return content if "exit_code" in content else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
