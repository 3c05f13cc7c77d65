"""The logger of Flare, for training.log and the terminal. Rank 0 logs at INFO, the other ranks at WARNING."""

import contextlib
import logging
import sys
import threading
from pathlib import Path

from tqdm import tqdm

from flare.terminal import fold, paint

log = logging.getLogger("flare")


FILES_ONLY = {"terminal": False}
"""``extra`` of a log record that is not shown on the terminal, because the script prints it itself."""


COLORS = {logging.WARNING: "yellow", logging.ERROR: "red"}


class _TerminalHandler(logging.Handler):
    """Writes to stderr without breaking the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "terminal", True):
            return
        with contextlib.suppress(OSError, ValueError):  # if stderr is closed, the line is lost but the run continues
            text = fold(self.format(record), sys.stderr)
            color = COLORS.get(record.levelno)
            tqdm.write(paint(text, color, sys.stderr) if color else text, file=sys.stderr)


class _LogFileHandler(logging.FileHandler):
    """A log file that may be deleted, or whose disk may be full. It warns once, and training continues."""

    warned = False

    def emit(self, record: logging.LogRecord) -> None:
        try:  # the base class opens the file outside its own try
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
    """Silence torchao's messages about kernels for other GPUs. transformers imports torchao if it is installed."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _handle_thread_error(args: threading.ExceptHookArgs) -> None:
    """Handle errors of threads. TensorBoard's writer ends on a full disk: one warning instead of a traceback."""
    if issubclass(args.exc_type, OSError) and type(args.thread).__module__.startswith("tensorboard."):
        log.warning(f"cannot write TensorBoard's files: {args.exc_value}")
    else:
        threading.__excepthook__(args)


def start_logging(rank: int = 0, world_size: int = 1, path: Path | None = None, logs_dir: Path | None = None) -> None:
    """Set the outputs of the logger: the terminal (rank 0), training.log, and the log file of this rank.

    Args:
        path: training.log; None for no such file.
        logs_dir: directory for rankN.log; None for no such file.
    """
    threading.excepthook = _handle_thread_error
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
