"""The directory that holds the blocks of a stream: creating it, waiting for blocks, cleaning up after killed runs."""

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
from flare.data.streaming.messages import ProducerConfig
from flare.errors import EnvError
from flare.logs import log

POLL_SEC = 0.01
MISSING_DIRECTORY_SEC = 60.0
"""How long a rank waits after the directory was removed. The first rank reports the reason and ends the run before."""
PRODUCER_EXIT_SEC = 30.0
"""Time for the producer to exit after it was stopped. Then it is killed."""
SLOW_WAIT_SEC = 10.0
"""A longer wait for rows is logged."""


class BlockDirectory:
    """A new directory under ``--cache_dir``, locked by this process until it ends.

    Raises: EnvError if it cannot be created.
    """

    def __init__(self, cache_dir: Path) -> None:
        try:
            self._create(cache_dir / "streaming")
        except OSError as error:
            raise EnvError(f"cannot write to --cache_dir {cache_dir}: {error.strerror or error}") from error

    def _create(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname()
        with open(root / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for directory in root.glob(f"{host}-*"):
                remove_if_abandoned(directory)
            self.directory = Path(tempfile.mkdtemp(dir=root, prefix=f"{host}-"))
            self.directory.chmod(0o755)
            self.owner = lock_directory(self.directory)

    def close(self) -> None:
        """Delete the directory with its blocks and release the lock."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.owner.close()


def lock_directory(directory: Path) -> IO[str]:
    """Lock a directory of blocks for as long as the returned file is open.

    Raises: BlockingIOError if another process has locked it.
    """
    owner = open(directory / "owner", "w")  # noqa: SIM115 (the open file is the lock)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner.close()
        raise
    owner.write(f"{os.getpid()}\n")
    owner.flush()
    return owner


def remove_if_abandoned(directory: Path) -> None:
    """Remove the blocks of a run that was killed. A directory that is in use stays."""
    try:
        owner = lock_directory(directory)
    except OSError:  # in use, or not ours
        return
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    shutil.rmtree(directory, ignore_errors=True)
    owner.close()
    log.info(f"removed {directory}, {size:,} bytes that a killed run left behind")


class ProducerClient:
    """Starts the producer and receives its messages. Only the first rank of a host has one."""

    def __init__(self, config: ProducerConfig, blocks: BlockDirectory) -> None:
        self.blocks, self.directory = blocks, blocks.directory
        self.child = Child("flare.data.streaming.producer")
        self.child.send(config)
        self.newest_block = config.place.block - 1
        self.warned_bad_rows = 0

    def wait_for(self, block: int) -> None:
        """Wait until a block is complete.

        Raises: the error that the producer reports; EnvError if the producer died.
        """
        t0 = time.monotonic()
        while self.newest_block < block:
            try:
                kind, *facts = self.child.pipe.recv()
            except (EOFError, OSError):
                raise EnvError(
                    f"the process that tokenises ahead {self.child.describe_exit()}; the last checkpoint is good, and "
                    "the same command continues from it"
                ) from None
            if kind == "error":
                raise facts[0]
            self.newest_block, rows, bad = facts
            self._warn(rows, bad)
        if (waited := time.monotonic() - t0) > SLOW_WAIT_SEC:
            log.info(f"waited {waited:.0f} s for tokenised rows; --preprocessing_num_workers N takes more cores")

    def _warn(self, rows: int, bad: BadRows) -> None:
        if bad.count > self.warned_bad_rows:
            self.warned_bad_rows = bad.count
            log.warning(
                f"{bad.count} of the {rows:,} rows read since this start hold no usable text and are skipped: "
                f"{'; '.join(bad.first[:2])}"
            )

    def discard_below(self, block: int) -> None:
        """Let the producer delete the blocks before ``block``: no rank of this host reads them again."""
        self.child.send(block)

    def close(self) -> None:
        """Stop the producer, which ends its workers, and remove the blocks.

        Closing the pipe is not enough: it stays open while our prefetch thread waits on it. So None is sent.
        """
        if self.child.pipe.closed:
            return
        self.child.send(None)
        try:
            self.child.process.wait(PRODUCER_EXIT_SEC)
        except subprocess.TimeoutExpired:
            self.child.process.kill()
            self.child.process.wait()
        self.child.pipe.close()
        self.blocks.close()


class BlockWaiter:
    """Waits for blocks by looking for their directories. Every other rank of a host has one."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.is_closed = directory, False

    def wait_for(self, block: int) -> None:
        """Wait until a block is complete.

        Raises: EnvError if the directory of blocks was removed.
        """
        path = self.directory / f"{block:08d}"
        gone_since = None
        while not path.exists():
            if self.is_closed:
                raise EnvError("the rows were closed while a thread waited for a block")
            if self.directory.exists():
                gone_since = None
            else:
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > MISSING_DIRECTORY_SEC:
                    raise EnvError(f"{self.directory} is gone: the process that tokenises ahead has ended")
            time.sleep(POLL_SEC)

    def discard_below(self, block: int) -> None:
        """Does nothing: the first rank of the host does this."""

    def close(self) -> None:
        """End a wait of the prefetch thread."""
        self.is_closed = True
