"""What a terminal can show: its width, colours, lines folded to it. Standard library only, imports nothing of ours.

What goes into a file or a pipe is left as it is: one message a line, no colours.
"""

import contextlib
import os
import textwrap
from typing import TextIO

MAX_COLUMNS = 100
"""Longer lines are hard to read; what we print is no wider on any terminal."""

COLORS = {"bold": "1", "red": "1;31", "yellow": "33"}


def columns(stream: TextIO) -> int:
    """Columns to fill: the terminal's or ``COLUMNS``, at most 100; 100 where there is neither."""
    try:
        found = int(os.environ.get("COLUMNS") or os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError, AttributeError):
        found = 0
    return min(found, MAX_COLUMNS) if found > 0 else MAX_COLUMNS


def is_terminal(stream: TextIO) -> bool:
    """Whether somebody looks at it."""
    try:
        return stream.isatty()
    except (ValueError, AttributeError):  # closed, or replaced by something that is no file
        return False


def has_colors(stream: TextIO) -> bool:
    """A terminal that may be coloured. Source: https://no-color.org."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, color: str, stream: TextIO) -> str:
    """The text in a colour of ``COLORS`` where the stream has colours."""
    return f"\033[{COLORS[color]}m{text}\033[0m" if has_colors(stream) else text


def tell_of_stop() -> None:
    """Say on stderr that a first Ctrl-C was heard: a step and a checkpoint can take minutes.

    For signal handlers, which may not use a stream that the program is writing to.
    """
    with contextlib.suppress(OSError):
        os.write(2, b"Ctrl-C: ends after this step, with a checkpoint; a second Ctrl-C ends at once\n")


def fold(text: str, stream: TextIO) -> str:
    """Lines that are too wide for a terminal, broken between words and indented; paths stay whole."""
    if not is_terminal(stream):
        return text
    width = columns(stream)
    return "\n".join(_fold_line(line, width) if len(line) > width else line for line in text.split("\n"))


def _fold_line(line: str, width: int) -> str:
    return textwrap.fill(
        line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )  # fmt: skip
