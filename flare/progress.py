"""Where a run is, and who asked it to stop."""

import signal
from dataclasses import asdict, dataclass, field

from flare.options import Options
from flare.terminal import tell_of_stop

STOP_FILE = "STOP"


@dataclass
class Progress:
    """Where a run is: all that a checkpoint must know besides weights and optimizer."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    history: list[dict] = field(default_factory=list)
    data_place: dict | None = None  # of streamed rows
    skipped_steps: int = 0  # whose numbers were not finite: --skip_nonfinite
    loss_scale: float | None = None  # of the next step, in fp16
    good_steps: int = 0  # since the loss scale changed
    overflow_steps: int = 0  # without an update, for fp16 gradients overflowed

    def as_dict(self) -> dict:
        return asdict(self)

    def note_evaluation(self, loss: float, threshold: float) -> bool:
        """Take in an evaluation at this step; whether it is the best so far, by more than ``threshold``."""
        gain = self.best_loss is None or loss < self.best_loss - threshold
        if gain:
            self.best_loss, self.best_step = loss, self.step
        self.evaluations_without_gain = 0 if gain else self.evaluations_without_gain + 1
        return gain

    def out_of_patience(self, options: Options) -> bool:
        """Whether early stopping ends the run here."""
        patience = options.early_stopping_patience
        return patience is not None and self.evaluations_without_gain >= patience

    def forget_best(self) -> None:
        """Begin anew to look for the best evaluation."""
        self.best_loss, self.best_step, self.evaluations_without_gain = None, None, 0


class StopRequest:
    """Signals that ask for a clean stop. A second Ctrl-C stops at once.

    Args:
        aborts_at: the number of signals of any kind of which the last one stops at once, too; None leaves that to the
            launcher: its workers get signals from it, from schedulers and from its own end.
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
        if name == "SIGINT" and self.aborts_at is not None:  # else the launcher tells, once for all ranks
            tell_of_stop()
