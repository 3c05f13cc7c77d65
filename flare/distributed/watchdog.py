"""Watchdog: detects a run that hangs, reports the rank that hangs and the stacks of all ranks, and ends the run.

A rank that waits in a collective cannot be interrupted, and Python signal handlers do not run there. So each rank has
a thread that times the training steps. Saving and evaluating have no time limit. The threads write heartbeats to the
store of the run. A rank without a heartbeat is a stopped or swapped-out process. Otherwise, the rank that does not
wait for other ranks is the one that hangs.

``kill -USR2 PID`` writes the stacks of a process to logs/stacks-rankN.txt at any time.
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

PACKAGE_DIR = str(Path(__file__).resolve().parents[1])
SLACK = 10
"""A step may take this many times the longest earlier step, even beyond ``--step_timeout``, whose default must fit all
models."""
COLLECTIVE_SHARE = 0.9
"""Share of ``--ddp_timeout``. The watchdog comes first, because the timeout of a collective names no rank."""
WAITING_PLACES = (
    "torch/distributed", "torch/nn/parallel/distributed.py", "torch/autograd/graph.py", "torch/cuda/streams.py",
)  # fmt: skip
"""Files of torch in which a rank waits for other ranks. Gradients are reduced inside the backward pass. On a GPU,
collectives are only queued, and a rank waits for a CUDA event behind them."""


@dataclass(frozen=True)
class StepLimits:
    """Time limits of the first steps of a process (compilation, caches) and of later steps."""

    first_sec: float
    later_sec: float

    @classmethod
    def of(cls, step_timeout: float, ddp_timeout: float) -> "StepLimits":
        first = COLLECTIVE_SHARE * ddp_timeout
        return cls(first, min(first, step_timeout))


class Watchdog:
    """Watches the steps of one rank.

    Args:
        store: the store that all ranks share; None for a single process.
        stacks: the directory for stacks-rankN.txt.
        on_hang: called with the error on one rank, before the process ends.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store | None,
        limits: StepLimits,
        stacks: Path,
        on_hang: Callable[[str], None],
    ) -> None:
        self.rank, self.size, self.store, self.limits, self.on_hang = rank, size, store, limits, on_hang
        self.stacks = stacks
        self.interval = min(5.0, limits.later_sec / 8)
        self.longest_sec, self.steps_done, self.newest = 0.0, 0, 0
        self.num_beats, self.heartbeat = 0, {}
        self.current: tuple[int, float] | None = None  # (step, its start time)
        self.main_thread = threading.get_ident()
        self.closed = threading.Event()
        self.file = open(self.stacks_file(rank), "w", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)

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
        size = os.fstat(self.file.fileno()).st_size
        self.file.close()
        if size == 0:
            self.stacks_file(self.rank).unlink(missing_ok=True)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Time the training step inside this context."""
        t0 = time.monotonic()
        self.current = (number, t0)
        try:
            yield
        finally:
            self.current = None
        if self.steps_done:
            self.longest_sec = max(self.longest_sec, time.monotonic() - t0)
        if number > self.newest:  # a step may be entered twice: to run it and to read its results
            self.newest = number
            self.steps_done += 1

    @property
    def limit_sec(self) -> float:
        """Time limit of the current step."""
        if self.steps_done < 2:  # the second step compiles again when a shape differs
            return self.limits.first_sec
        return min(max(self.limits.later_sec, SLACK * self.longest_sec), self.limits.first_sec)

    # -- the watchdog's thread ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        last_seen: dict[int, tuple[int, float]] = {}  # rank -> (its number of beats, when that last changed)
        while not self.closed.wait(self.interval):
            self._beat()
            step, now = self.current, time.monotonic()
            for rank, heartbeat in self._heartbeats(self._watched_ranks).items():
                if last_seen.get(rank, (0, 0.0))[0] != heartbeat["beats"]:
                    last_seen[rank] = (heartbeat["beats"], now)
            if step and now - step[1] > self.limit_sec:
                self._end_run(
                    f"step {step[0]} did not end within {self.limit_sec:.0f} s",
                    lambda hanging=step: self.current is hanging,
                )
            elif any(now - since > self.limits.first_sec for _, since in last_seen.values()):
                self._end_run(f"no heartbeat for {self.limits.first_sec:.0f} s", lambda: not self.closed.is_set())

    @property
    def _watched_ranks(self) -> list[int]:
        """Ranks whose heartbeats this rank checks: rank 0 checks all others, rank 1 checks rank 0."""
        return {0: list(range(1, self.size)), 1: [0]}.get(self.rank, [])

    def _beat(self, **facts: object) -> None:
        self.num_beats += 1
        self.heartbeat = {"beats": self.num_beats, "host": socket.gethostname(), "pid": os.getpid(), **facts}
        if self.store:
            with contextlib.suppress(DistError):
                self.store.set(f"heartbeat/{self.rank}", json.dumps(self.heartbeat))

    def _heartbeats(self, ranks: list[int]) -> dict[int, dict]:
        """The last heartbeat of each of these ranks that has written one."""
        heartbeats = {}
        if self.store:
            with contextlib.suppress(DistError):
                present = [rank for rank in ranks if self.store.check([f"heartbeat/{rank}"])]
                heartbeats = {rank: json.loads(self.store.get(f"heartbeat/{rank}")) for rank in present}
        return heartbeats

    def _end_run(self, problem: str, still_hangs: Callable[[], bool]) -> None:
        """Write the stacks, find the rank that hangs, report it, and end this process.

        Returns without ending the process if ``still_hangs`` is no longer true after a short wait.
        """
        all_ranks = list(range(self.size))
        faulthandler.dump_traceback(self.file, all_threads=True)
        self._beat(where=self.activity())
        before = self._heartbeats(all_ranks)
        for _ in range(4):  # the steps of other ranks may have begun later
            time.sleep(self.interval)
            self._beat(where=self.activity())
        if not still_hangs():
            return  # slow, but not hung
        latest = self._heartbeats(all_ranks) | {self.rank: self.heartbeat}
        silent = [r for r in latest if r != self.rank and latest[r]["beats"] == before.get(r, {}).get("beats")]
        if self.rank == min(latest.keys() - set(silent)):
            silent_here = [rank for rank in silent if latest[rank]["host"] == self.heartbeat["host"]]
            for rank in silent_here:
                self._request_stacks(latest[rank]["pid"], self.stacks_file(rank))
            absent = [rank for rank in all_ranks if rank not in latest]
            self.on_hang(
                f"{problem}: {describe_hang(latest, absent + silent)}; stacks of the ranks: {self.stacks}/"
                "stacks-rank*.txt; the last checkpoint is good; if a step may take that long, give "
                "--step_timeout and --ddp_timeout"
            )
            for rank in silent_here:  # a stopped process does not react to SIGTERM
                with contextlib.suppress(OSError):
                    os.kill(latest[rank]["pid"], signal.SIGKILL)
        else:
            time.sleep(8 * self.interval)  # the rank that reports the error must be the first to end
        os._exit(FlareError.exit_code)

    def activity(self) -> str:
        """What the main thread of this rank does: "waits", or "is in FILE:LINE (FUNCTION)"."""
        frame = sys._current_frames()[self.main_thread]
        while frame.f_back and PACKAGE_DIR not in frame.f_code.co_filename:
            if any(place in frame.f_code.co_filename for place in WAITING_PLACES):
                return "waits"
            frame = frame.f_back
        return f"is in {Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"

    def _request_stacks(self, pid: int, file: Path) -> None:
        """Make a silent process of this host write its stacks. A stopped process writes them when it is continued."""
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGUSR2)
            os.kill(pid, signal.SIGCONT)
            deadline = time.monotonic() + self.interval
            while file.stat().st_size == 0 and time.monotonic() < deadline:
                time.sleep(0.05)


def describe_hang(heartbeats: dict[int, dict], silent: list[int]) -> str:
    """The ranks without a heartbeat; if none, the ranks that do not wait for others; if none, all ranks."""
    known = {rank: f" (pid {beat['pid']} on {beat['host']})" for rank, beat in heartbeats.items()}
    if silent:
        return ", ".join(f"rank {rank}{known.get(rank, '')} does not answer" for rank in silent)
    places = {rank: beat.get("where", "waits") for rank, beat in sorted(heartbeats.items())}
    busy = {rank: place for rank, place in places.items() if place != "waits"}
    return ", ".join(f"rank {rank} {place}" for rank, place in (busy or places).items())
