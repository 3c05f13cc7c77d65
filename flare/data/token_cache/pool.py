"""Worker processes that tokenise pieces into parts in parallel. If one is killed, the build ends with an error."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from flare.child_process import Child
from flare.data.sources.base import Piece
from flare.data.token_cache.encode import Encoder
from flare.data.token_cache.parts import write_part
from flare.errors import EnvError


@dataclass(frozen=True)
class Task:
    """Tokenise the first ``limit`` rows of a piece into the part ``directory``."""

    index: int
    piece: Piece
    directory: Path
    limit: int | None = None


Report = Callable[[int, int, int], None]
"""Called with the index of the task, and the tokens and characters tokenised since the last call."""


def run_tasks(
    next_task: Callable[[], Task | None], encoder: Encoder, processes: int, threads: int, report: Report
) -> Iterator[int]:
    """Run all tasks. Yields the index of each task when it finishes.

    Args:
        next_task: returns the next task, or None if there is none at the moment. It is called again after each task.
        processes: if 1, the work is done in this process, and its tokenizer uses all cores.
        threads: tokenizer threads in each worker process.

    Raises: the error of a piece; EnvError when a worker was killed.
    """
    if processes == 1:
        while task := next_task():
            write_part(task.piece, encoder, task.directory, task.limit, lambda *done, i=task.index: report(i, *done))
            yield task.index
        return
    with WorkerPool(encoder, processes, threads) as pool:
        while True:
            while pool.has_idle and (task := next_task()):
                pool.submit(task)
            if not pool.is_busy:
                return
            yield from pool.finished_tasks(report)


class Worker(Child):
    """A worker process and its current task."""

    def __init__(self, threads: int) -> None:
        super().__init__("flare.data.token_cache.worker", threads)
        self.task: Task | None = None

    def assign(self, task: Task) -> None:
        """Send a task."""
        self.send((task.index, task.piece, str(task.directory), task.limit))
        self.task = task

    def exit_error(self) -> EnvError:
        """The error for a worker that ended unexpectedly."""
        return EnvError(
            f"a tokenising worker {self.describe_exit()}; finished parts are kept, and the same "
            "command continues; use fewer workers with --preprocessing_num_workers"
        )


class WorkerPool:
    """Worker processes that run until the ``with`` block ends."""

    def __init__(self, encoder: Encoder, processes: int, threads: int) -> None:
        self.workers = [Worker(threads) for _ in range(processes)]
        message = encoder.to_message()
        for worker in self.workers:  # after all have started: sending megabytes blocks until the worker reads
            worker.send(message)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_exception: object) -> None:
        for worker in self.workers:
            worker.pipe.close()
            if worker.task is not None:
                worker.process.kill()
        for worker in self.workers:
            worker.process.wait()

    @property
    def has_idle(self) -> bool:
        return any(worker.task is None for worker in self.workers)

    @property
    def is_busy(self) -> bool:
        return any(worker.task is not None for worker in self.workers)

    def submit(self, task: Task) -> None:
        """Give a task to an idle worker."""
        next(worker for worker in self.workers if worker.task is None).assign(task)

    def finished_tasks(self, report: Report) -> Iterator[int]:
        """Wait for messages of the workers. Yields the indices of finished tasks."""
        by_pipe = {worker.pipe: worker for worker in self.workers if worker.task is not None}
        for pipe in wait(list(by_pipe)):
            worker = by_pipe[pipe]
            kind, *facts = self._receive(worker)
            if kind == "error":
                raise facts[0]
            if kind == "tokens":
                report(*facts)
            else:
                worker.task = None
                yield facts[0]

    @staticmethod
    def _receive(worker: Worker) -> tuple:
        pipe: Connection = worker.pipe
        try:
            return pipe.recv()
        except (EOFError, OSError):
            raise worker.exit_error() from None
