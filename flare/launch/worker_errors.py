"""How a worker's error reaches the launcher, which shows the first one once: a file that torchrun names for each."""

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
    """From a worker: when the launcher dies, killed or not, get SIGTERM and so stop with a checkpoint (Linux)."""
    if DEVICE_VARIABLE in os.environ and ERROR_FILE_VARIABLE in os.environ:
        end_with_parent(signal.SIGTERM)


def report_to_launcher(message: str, exit_code: int) -> bool:
    """From a worker: leave the error for the launcher to show. False when no launcher of ours is there."""
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
    """How the worker that failed first did, and whether it told so itself."""

    rank: int
    message: str
    exit_code: int
    told: bool


def first_failure(error: object, logs: Path | str, workers_files: Path | None = None) -> Failure:
    """What to say of workers that failed.

    Args:
        error: torchrun's ChildFailedError. logs: where a worker that could not tell has written more.
        workers_files: where others may have told, in place of one that could not.
    """
    rank, failure = error.get_first_failure()
    told = _told_error(failure.error_file) or (_told_by_any(workers_files) if workers_files else None)
    if told:
        return Failure(rank, told["message"], told["exit_code"], True)
    # One that was killed comes before those that ended because they waited for it.
    rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
    if failure.exitcode < 0:
        hint = "; the kernel does so when memory is short, see dmesg" if failure.exitcode == -signal.SIGKILL else ""
        message = f"rank {rank} was ended by {failure.signal_name()} (pid {failure.pid}){hint}"
        return Failure(rank, message, 5, False)
    return Failure(rank, f"rank {rank} failed with exit code {failure.exitcode}; see {logs}", 5, False)


def _told_by_any(workers_files: Path) -> dict | None:
    """What another worker of this host told: the one that ended a rank that hung."""
    return next((told for file in workers_files.rglob("error.json") if (told := _told_error(str(file)))), None)


def _told_error(path: str | None) -> dict | None:
    try:
        content = json.loads(Path(path or "").read_text(encoding="utf-8"))["message"]
        return content if "exit_code" in content else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
