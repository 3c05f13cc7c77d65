"""One logger for all: training.log for people, stderr for the terminal. Rank 0 at INFO, the others at WARNING."""

import contextlib
import logging
import sys
import threading
from pathlib import Path

from tqdm import tqdm

from flare.terminal import fold, paint

log = logging.getLogger("flare")


FILES_ONLY = {"terminal": False}
"""``extra`` of a record that the terminal does not show, because the script prints it itself."""


COLORS = {logging.WARNING: "yellow", logging.ERROR: "red"}


class _TerminalHandler(logging.Handler):
    """Lines that do not tear the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "terminal", True):
            return
        with contextlib.suppress(OSError, ValueError):  # stderr closed under us: a line lost, not the run
            text = fold(self.format(record), sys.stderr)
            color = COLORS.get(record.levelno)
            tqdm.write(paint(text, color, sys.stderr) if color else text, file=sys.stderr)


class _LogFileHandler(logging.FileHandler):
    """A log file that may be deleted or whose disk may be full: it is warned of once, training goes on."""

    warned = False

    def emit(self, record: logging.LogRecord) -> None:
        try:  # the base class opens the file outside its own guard
            if self.stream is not None and not Path(self.baseFilename).exists():
                self.close()
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.warned:
            self.warned = True
            tqdm.write(f"warning: cannot write {self.baseFilename}: {sys.exc_info()[1]}", file=sys.stderr)


def quiet_torchao() -> None:
    """Let torchao, which transformers imports when it is there, not tell of kernels for other GPUs."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """TensorBoard's writers end on a full disk: a line, no traceback, as for every log that cannot be written."""
    if issubclass(ended.exc_type, OSError) and type(ended.thread).__module__.startswith("tensorboard."):
        log.warning(f"cannot write TensorBoard's files: {ended.exc_value}")
    else:
        threading.__excepthook__(ended)


def start_logging(rank: int = 0, world_size: int = 1, path: Path | None = None, logs_dir: Path | None = None) -> None:
    """Point the logger at the terminal (rank 0), at training.log and at this rank's own file."""
    threading.excepthook = _thread_ended
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.INFO)
    log.propagate = False
    who = f" [rank {rank}]" if world_size > 1 else ""
    plain = logging.Formatter(f"%(asctime)s %(levelname)s{who} %(message)s", "%Y-%m-%d %H:%M:%S")
    if rank == 0:
        terminal = _TerminalHandler()
        terminal.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(terminal)
    for target, level in (
        (path, logging.INFO if rank == 0 else logging.WARNING),
        (logs_dir / f"rank{rank}.log" if logs_dir else None, logging.INFO),
    ):
        if target is not None:
            handler = _LogFileHandler(target, encoding="utf-8", errors="backslashreplace", delay=True)
            handler.setFormatter(plain)
            handler.setLevel(level)
            log.addHandler(handler)
