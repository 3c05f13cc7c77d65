"""argparse as all commands of Flare use it: help in groups, as wide as the terminal, and errors of one line."""

import argparse
import re
import sys
from typing import NoReturn

from flare.errors import ConfigError, nearest
from flare.terminal import columns, paint

UNKNOWN = "unrecognized arguments: "


class HelpFormatter(argparse.HelpFormatter):
    """Folds what is too wide, but for indented lines: those are examples, to be copied."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=columns(sys.stdout))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        lines = text.strip("\n").split("\n")
        return "\n".join(line if line.startswith(" ") else fill(line, width, indent) for line in lines)


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line, as everywhere in Flare; flags are never abbreviated; headings are bold on a terminal.

    Args:
        usage: after the program's name; a list of 60 flags helps nobody.
    """

    def __init__(self, prog: str, usage: str, description: str, examples: str, **more: object) -> None:
        super().__init__(
            prog=prog, usage=f"{prog} {usage}", description=description, epilog=examples,
            formatter_class=HelpFormatter, allow_abbrev=False, **more,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith(UNKNOWN):
            first = message.removeprefix(UNKNOWN).split()[0].split("=")[0]
            hint = nearest(first, self._option_string_actions)
        raise ConfigError(f"{message[0].lower()}{message[1:]}{hint}; see {self.prog} --help")

    def format_help(self) -> str:
        return re.sub(r"(?m)^(\S.*:)$", lambda found: paint(found[1], "bold", sys.stdout), super().format_help())
