"""Width, colors and line folding of a terminal. Standard library only.

Output to a file or a pipe is not changed: one message per line, no colors.
"""

import contextlib
import os
import textwrap
from typing import TextIO

MAX_COLUMNS = 100
"""Limit on any terminal, because longer lines are hard to read."""

COLORS = {"bold": "1", "red": "1;31", "yellow": "33"}


def columns(stream: TextIO) -> int:
    """Number of columns to use: ``COLUMNS`` or the terminal's width, at most 100; 100 without a terminal."""
    try:
        found = int(os.environ.get("COLUMNS") or os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError, AttributeError):
        found = 0
    return min(found, MAX_COLUMNS) if found > 0 else MAX_COLUMNS


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream is a terminal."""
    try:
        return stream.isatty()
    except (ValueError, AttributeError):  # closed, or replaced by an object that is not a file
        return False


def has_colors(stream: TextIO) -> bool:
    """Whether the stream is a terminal that may use colors. Source: https://no-color.org."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, color: str, stream: TextIO) -> str:
    """The text in a color of ``COLORS``, if the stream has colors."""
    return f"\033[{COLORS[color]}m{text}\033[0m" if has_colors(stream) else text


def print_stop_notice() -> None:
    """Print on stderr that the run will stop after a first Ctrl-C, because step and checkpoint can take minutes.

    Safe in signal handlers, which must not use a stream that the program may be writing to.
    """
    with contextlib.suppress(OSError):
        os.write(2, b"Ctrl-C: the run stops after this step, with a checkpoint; a second Ctrl-C stops it at once\n")


def fold(text: str, stream: TextIO) -> str:
    """The text with lines wider than the terminal broken between words and indented. Paths are not broken."""
    if not is_terminal(stream):
        return text
    width = columns(stream)
    return "\n".join(_fold_line(line, width) if len(line) > width else line for line in text.split("\n"))


def _fold_line(line: str, width: int) -> str:
    return textwrap.fill(
        line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )  # fmt: skip
