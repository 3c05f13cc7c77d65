"""The directory of a stream's blocks: who makes it, who waits for what in it, and what is left of killed runs."""

import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO

from flare.child_process import Child
from flare.data.sources.documents import BadRows
from flare.data.streaming.messages import Order
from flare.errors import EnvError
from flare.logs import log

POLL_SEC = 0.01
GONE_SEC = 60.0
"""How long a rank waits on when the window is gone: the rank that started the producer tells why, and ends all."""
END_SEC = 30.0
"""For the producer to end when it is told to; then it is killed."""
SLOW_SEC = 10.0
"""A wait for rows that is worth a line in the log."""


class Window:
    """A fresh directory under ``--cache_dir``, this process's own until it ends.

    Raises: EnvError when it cannot be made.
    """

    def __init__(self, cache_dir: Path) -> None:
        try:
            self._make(cache_dir / "streaming")
        except OSError as error:
            raise EnvError(f"cannot write to --cache_dir {cache_dir}: {error.strerror or error}") from error

    def _make(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname()
        with open(root / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for directory in root.glob(f"{host}-*"):
                remove_if_left(directory)
            self.directory = Path(tempfile.mkdtemp(dir=root, prefix=f"{host}-"))
            self.directory.chmod(0o755)
            self.owner = take(self.directory)

    def close(self) -> None:
        """Give the directory up; what is in it goes."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.owner.close()


def take(directory: Path) -> IO[str]:
    """Mark a window as in use for as long as the returned file is open. Raises: BlockingIOError when it is in use."""
    owner = open(directory / "owner", "w")  # noqa: SIM115 (the open file is the mark)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner.close()
        raise
    owner.write(f"{os.getpid()}\n")
    owner.flush()
    return owner


def remove_if_left(directory: Path) -> None:
    """Remove the window of a run that was killed."""
    try:
        owner = take(directory)
    except OSError:  # in use, or not ours
        return
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    shutil.rmtree(directory, ignore_errors=True)
    owner.close()
    log.info(f"removed {directory}, {size:,} bytes that a killed run has left")


class Making:
    """A host's first rank: it has the producer, and hears from it when blocks are there."""

    def __init__(self, order: Order, window: Window) -> None:
        self.window, self.directory = window, window.directory
        self.child = Child("flare.data.streaming.producer")
        self.child.send(order)
        self.made = order.place.block - 1
        self.warned = 0

    def wait_for(self, block: int) -> None:
        """Raises: what the producer tells; EnvError when it died."""
        t0 = time.monotonic()
        while self.made < block:
            try:
                kind, *facts = self.child.pipe.recv()
            except (EOFError, OSError):
                raise EnvError(
                    f"the process that tokenises ahead {self.child.describe_exit()}; the last checkpoint is good, the "
                    "same command goes on from there"
                ) from None
            if kind == "error":
                raise facts[0]
            self.made, rows, bad = facts
            self._warn(rows, bad)
        if (waited := time.monotonic() - t0) > SLOW_SEC:
            log.info(f"waited {waited:.0f} s for tokenised rows; --preprocessing_num_workers N takes more cores")

    def _warn(self, rows: int, bad: BadRows) -> None:
        if bad.count > self.warned:
            self.warned = bad.count
            log.warning(
                f"{bad.count} of the {rows:,} rows read since this start hold no usable text and were left out: "
                f"{'; '.join(bad.first[:2])}"
            )

    def discard_below(self, block: int) -> None:
        """No rank of this host will read these blocks again."""
        self.child.send(block)

    def close(self) -> None:
        """End the producer, which ends its workers, and remove the window.

        It is told: a pipe is not closed for the other end while a thread of ours, that reads ahead, waits on it.
        """
        if self.child.pipe.closed:
            return
        self.child.send(None)
        try:
            self.child.process.wait(END_SEC)
        except subprocess.TimeoutExpired:
            self.child.process.kill()
            self.child.process.wait()
        self.child.pipe.close()
        self.window.close()


class Waiting:
    """Another rank of the host: it looks whether blocks are there."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.is_closed = directory, False

    def wait_for(self, block: int) -> None:
        """Raises: EnvError when the window is gone."""
        path = self.directory / f"{block:08d}"
        gone_since = None
        while not path.exists():
            if self.is_closed:
                raise EnvError("no row is read any more")
            if self.directory.exists():
                gone_since = None
            else:
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > GONE_SEC:
                    raise EnvError(f"{self.directory} is gone: the process that tokenises ahead has ended")
            time.sleep(POLL_SEC)

    def discard_below(self, block: int) -> None:
        """Not this rank's business."""

    def close(self) -> None:
        """End a wait of the thread that reads ahead."""
        self.is_closed = True
