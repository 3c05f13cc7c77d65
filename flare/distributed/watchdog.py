"""A run that hangs: found by the clock, told with the stacks of all ranks, and ended.

A rank that waits in a collective for another cannot be interrupted, and Python runs no signal handler there. So each
rank has a thread that looks at the clock while a step runs; saving and evaluating take as long as they take. The
threads leave signs of life in the processes' store: who leaves none is a stopped or swapped-out process, and whoever
does not wait for others is the one that they wait for.

``kill -USR2 PID`` adds a process's stacks to logs/stacks-rankN.txt at any time.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import DistError, Store

from flare.errors import FlareError

OURS = str(Path(__file__).resolve().parents[1])
SLACK = 10
"""A step that takes this many times the longest one before hangs, whatever the limit: the limit is for all models."""
COLLECTIVE_SHARE = 0.9
"""Of ``--ddp_timeout``: ours comes first, for the collectives' own says neither who nor where."""
WAITING = (
    "torch/distributed", "torch/nn/parallel/distributed.py", "torch/autograd/graph.py", "torch/cuda/streams.py",
)  # fmt: skip
"""Places in torch where a rank waits for others. The reduction of gradients is inside the backward pass; on a GPU
all of that is only queued, and the wait for another rank is the wait for an event behind it."""


@dataclass(frozen=True)
class Limits:
    """Seconds that a step may take: the first of a process (compilation, caches), and later ones."""

    first_sec: float
    later_sec: float

    @classmethod
    def of(cls, step_timeout: float, ddp_timeout: float) -> "Limits":
        first = COLLECTIVE_SHARE * ddp_timeout
        return cls(first, min(first, step_timeout))


class Watchdog:
    """Watches the steps of one rank.

    Args:
        store: of all ranks; None for a single process.
        stacks: the directory for stacks-rankN.txt.
        on_hang: called on one rank with the error, before the process ends.
    """

    def __init__(
        self, rank: int, size: int, store: Store | None, limits: Limits, stacks: Path, on_hang: Callable[[str], None]
    ) -> None:
        self.rank, self.size, self.store, self.limits, self.on_hang = rank, size, store, limits, on_hang
        self.stacks = stacks
        self.interval = min(5.0, limits.later_sec / 8)
        self.longest_sec, self.steps_done, self.newest = 0.0, 0, 0
        self.beats, self.sign = 0, {}
        self.current: tuple[int, float] | None = None  # (step, when it began)
        self.main_thread = threading.get_ident()
        self.closed = threading.Event()
        self.file = open(self.stacks_file(rank), "w", encoding="utf-8")  # noqa: SIM115 (as long as the watchdog)

    def stacks_file(self, rank: int) -> Path:
        return self.stacks / f"stacks-rank{rank}.txt"

    def __enter__(self) -> "Watchdog":
        self._beat()
        faulthandler.register(signal.SIGUSR2, file=self.file, all_threads=True)
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.thread.join()
        faulthandler.unregister(signal.SIGUSR2)
        wrote = os.fstat(self.file.fileno()).st_size
        self.file.close()
        if wrote == 0:
            self.stacks_file(self.rank).unlink(missing_ok=True)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a training step: the clock runs."""
        t0 = time.monotonic()
        self.current = (number, t0)
        try:
            yield
        finally:
            self.current = None
        if self.steps_done:
            self.longest_sec = max(self.longest_sec, time.monotonic() - t0)
        if number > self.newest:  # a step may be entered twice: to compute it, and to learn what came of it
            self.newest = number
            self.steps_done += 1

    @property
    def limit_sec(self) -> float:
        """Of the step that runs."""
        if self.steps_done < 2:  # the second compiles anew where a shape differs
            return self.limits.first_sec
        return min(max(self.limits.later_sec, SLACK * self.longest_sec), self.limits.first_sec)

    # -- the thread ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        heard: dict[int, tuple[int, float]] = {}  # rank -> (its beats, when they last changed)
        while not self.closed.wait(self.interval):
            self._beat()
            step, now = self.current, time.monotonic()
            for rank, sign in self._signs(self._watched).items():
                if heard.get(rank, (0, 0.0))[0] != sign["beats"]:
                    heard[rank] = (sign["beats"], now)
            if step and now - step[1] > self.limit_sec:
                self._end_run(
                    f"step {step[0]} did not end within {self.limit_sec:.0f} s",
                    lambda begun=step: self.current is begun,
                )
            elif any(now - since > self.limits.first_sec for _, since in heard.values()):
                self._end_run(f"no sign of life for {self.limits.first_sec:.0f} s", lambda: not self.closed.is_set())

    @property
    def _watched(self) -> list[int]:
        """Ranks that this one listens to all the time: the first to all, the second to the first."""
        return {0: list(range(1, self.size)), 1: [0]}.get(self.rank, [])

    def _beat(self, **facts: object) -> None:
        self.beats += 1
        self.sign = {"beats": self.beats, "host": socket.gethostname(), "pid": os.getpid(), **facts}
        if self.store:
            with contextlib.suppress(DistError):
                self.store.set(f"alive/{self.rank}", json.dumps(self.sign))

    def _signs(self, ranks: list[int]) -> dict[int, dict]:
        """The last sign of life of each of these ranks that has left one."""
        signs = {}
        if self.store:
            with contextlib.suppress(DistError):
                there = [rank for rank in ranks if self.store.check([f"alive/{rank}"])]
                signs = {rank: json.loads(self.store.get(f"alive/{rank}")) for rank in there}
        return signs

    def _end_run(self, what: str, still: Callable[[], bool]) -> None:
        """Dump stacks, find out who hangs, tell, and end this process; unless ``still`` is no longer true then."""
        everyone = list(range(self.size))
        faulthandler.dump_traceback(self.file, all_threads=True)
        self._beat(where=self._place())
        before = self._signs(everyone)
        for _ in range(4):  # others' clocks began a little later
            time.sleep(self.interval)
            self._beat(where=self._place())
        if not still():
            return  # slow, not hung
        signs = self._signs(everyone) | {self.rank: self.sign}
        silent = [r for r, sign in signs.items() if r != self.rank and sign["beats"] == before.get(r, {}).get("beats")]
        if self.rank == min(signs.keys() - set(silent)):
            here = [rank for rank in silent if signs[rank]["host"] == self.sign["host"]]
            for rank in here:
                self._ask_for_stacks(signs[rank]["pid"], self.stacks_file(rank))
            absent = [rank for rank in everyone if rank not in signs]
            self.on_hang(
                f"{what}: {describe_hang(signs, absent + silent)}; stacks of the ranks: {self.stacks}/"
                "stacks-rank*.txt; the last checkpoint is good; if a step may take that long, give "
                "--step_timeout and --ddp_timeout"
            )
            for rank in here:  # a signal that asks would not end them
                with contextlib.suppress(OSError):
                    os.kill(signs[rank]["pid"], signal.SIGKILL)
        else:
            time.sleep(8 * self.interval)  # the error that is told shall be the first one
        os._exit(FlareError.exit_code)

    def _place(self) -> str:
        """Where this rank's main thread is, in words."""
        frame = sys._current_frames()[self.main_thread]
        while frame.f_back and OURS not in frame.f_code.co_filename:
            if any(place in frame.f_code.co_filename for place in WAITING):
                return "waits"
            frame = frame.f_back
        return f"is in {Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"

    def _ask_for_stacks(self, pid: int, file: Path) -> None:
        """Of a silent process of this host. A stopped one writes them before anything else when it goes on."""
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGUSR2)
            os.kill(pid, signal.SIGCONT)
            deadline = time.monotonic() + self.interval
            while file.stat().st_size == 0 and time.monotonic() < deadline:
                time.sleep(0.05)


def describe_hang(signs: dict[int, dict], silent: list[int]) -> str:
    """Ranks that leave no sign of life; else those that do not wait for others; else where all are."""
    known = {rank: f" (pid {sign['pid']} on {sign['host']})" for rank, sign in signs.items()}
    if silent:
        return ", ".join(f"rank {rank}{known.get(rank, '')} does not answer" for rank in silent)
    places = {rank: sign.get("where", "waits") for rank, sign in sorted(signs.items())}
    busy = {rank: place for rank, place in places.items() if place != "waits"}
    return ", ".join(f"rank {rank} {place}" for rank, place in (busy or places).items())
