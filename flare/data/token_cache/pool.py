"""Worker processes that turn pieces into parts, several at once; their death is an error, never a hang."""

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
    """Make the part ``directory`` of the first ``limit`` rows of a piece."""

    index: int
    piece: Piece
    directory: Path
    limit: int | None = None


Report = Callable[[int, int, int], None]
"""Called with index of the task, tokens and characters that were done since the last call."""


def run_tasks(
    next_task: Callable[[], Task | None], encoder: Encoder, processes: int, threads: int, report: Report
) -> Iterator[int]:
    """Run tasks until there are no more; yields the index of each finished one, in the order of finishing.

    Args:
        next_task: the next task, or None when there is none at the moment. Asked again after each finished one.
        processes: with one the work is done in this process, whose tokenizer spreads over all cores.
        threads: of the tokenizer in each worker process.

    Raises: what a piece raised; EnvError when a worker was killed.
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
            yield from pool.answers(report)


class Worker(Child):
    """A worker process and the task that it has."""

    def __init__(self, threads: int) -> None:
        super().__init__("flare.data.token_cache.worker", threads)
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        """Send a task."""
        self.send((task.index, task.piece, str(task.directory), task.limit))
        self.task = task

    def death(self) -> EnvError:
        """How it died, for people."""
        return EnvError(
            f"a tokenising worker {self.describe_exit()}; finished parts are kept, the same command "
            "goes on from there; --preprocessing_num_workers N takes fewer workers"
        )


class WorkerPool:
    """Processes that live as long as the ``with`` block."""

    def __init__(self, encoder: Encoder, processes: int, threads: int) -> None:
        self.workers = [Worker(threads) for _ in range(processes)]
        message = encoder.to_message()
        for worker in self.workers:  # all are started by now: megabytes wait in a pipe till they are read
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
        next(worker for worker in self.workers if worker.task is None).give(task)

    def answers(self, report: Report) -> Iterator[int]:
        """Wait for news; yields the tasks that were finished."""
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
            raise worker.death() from None
