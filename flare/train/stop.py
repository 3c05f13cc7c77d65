"""Requests for a clean stop: signals, and a file ``STOP`` in the experiment directory."""

import signal

from flare.terminal import print_stop_notice

STOP_FILE = "STOP"


class StopRequest:
    """Signals that request a clean stop. A second Ctrl-C stops at once.

    Args:
        aborts_at: this many signals of any kind also stop at once. None for workers, where the launcher counts: they
            get signals from the launcher, from schedulers, and when the launcher ends.
    """

    def __init__(self, aborts_at: int | None = None) -> None:
        self.aborts_at = aborts_at
        self.count = 0
        self.signal_name: str | None = None

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.count += 1
        name = signal.Signals(number).name
        if self.count == self.aborts_at or (name == "SIGINT" and self.signal_name == "SIGINT"):
            raise KeyboardInterrupt(f"stopped at once by signal {self.count} ({name})")
        self.signal_name = name
        if name == "SIGINT" and self.aborts_at is not None:  # otherwise the launcher prints it, once for all ranks
            print_stop_notice()
