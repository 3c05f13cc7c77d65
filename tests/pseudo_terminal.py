"""Run a command as somebody at a terminal of a given width sees it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence

from tests.processes import REPO

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run_in_terminal(command: Sequence[object], columns: int, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code, and all that was written to the terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {k: v for k, v in environment.items() if k not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm"}
    process = subprocess.Popen(
        list(map(str, command)), cwd=REPO, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    return process.wait(timeout=60), written.decode(errors="replace")


def lines_of(written: str) -> list[str]:
    """The lines, with a progress bar's states one a line, without colours."""
    return [ESCAPE.sub("", line) for line in re.split(r"[\r\n]+", written)]
