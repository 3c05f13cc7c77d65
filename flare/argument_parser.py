"""Command lines of Flare: argparse with help in groups, help as wide as the terminal, and errors of one line.

``add_options`` and ``parse_options`` connect a parser with option fields (option_fields.py).
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from flare.errors import ConfigError, join_errors, nearest, one_line
from flare.option_fields import OptionField
from flare.option_values import check_values
from flare.terminal import columns, paint

UNKNOWN = "unrecognized arguments: "
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


class HelpFormatter(argparse.HelpFormatter):
    """Folds lines that are too wide, except indented ones: those are examples to be copied."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=columns(sys.stdout))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        lines = text.strip("\n").split("\n")
        return "\n".join(line if line.startswith(" ") else fill(line, width, indent) for line in lines)


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line, as everywhere in Flare; flags are never abbreviated; headings are bold on a terminal.

    Args:
        usage: text after the program's name; a list of 60 flags would help nobody.
    """

    def __init__(self, prog: str, usage: str, description: str, examples: str, **more: Any) -> None:
        super().__init__(
            prog=prog, usage=f"{prog} {usage}", description=description, epilog=examples,
            formatter_class=HelpFormatter, allow_abbrev=False, **more,
        )  # fmt: skip
        # argparse of Python < 3.14 reads -1e-5 as a flag; read as a value it gets a useful error instead.
        self._negative_number_matcher = NEGATIVE_NUMBER

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith(UNKNOWN):
            first = message.removeprefix(UNKNOWN).split()[0].split("=")[0]
            hint = nearest(first, self._option_string_actions)
        raise ConfigError(f"{message[0].lower()}{message[1:]}{hint}; see {self.prog} --help")

    def format_help(self) -> str:
        return re.sub(r"(?m)^(\S.*:)$", lambda found: paint(found[1], "bold", sys.stdout), super().format_help())


def add_options(parser: argparse.ArgumentParser, fields: Mapping[str, OptionField]) -> None:
    """Add a flag for each option to the group of its name, which is made when the parser has none.

    Values stay text, and options that were not given stay out of the result: ``check_values`` converts them.
    """
    groups = {group.title: group for group in parser._action_groups}
    for name, field in fields.items():
        if field.group not in groups:
            groups[field.group] = parser.add_argument_group(field.group)
        shape: dict[str, Any] = {}
        if field.kind == "bool":
            shape = {"nargs": "?", "const": "true"}
        elif field.kind == "list":
            shape = {"nargs": "*"}
        groups[field.group].add_argument(
            f"--{name}", help=field.full_help.replace("%", "%%"), metavar=field.value_name,
            required=field.is_required, default=argparse.SUPPRESS, **shape,
        )  # fmt: skip


def parse_options(
    parser: argparse.ArgumentParser, fields: Mapping[str, OptionField], argv: list[str]
) -> dict[str, Any]:
    """The checked values of the options given on a command line.

    Raises: ConfigError with all mistakes.
    """
    given, unknown = parser.parse_known_args(argv)
    problems = unknown_arguments(parser, unknown)
    values = check_values(fields, vars(given), lambda name: f"--{name}", problems, from_text=True)
    if problems:
        raise ConfigError(join_errors(problems))
    return values


def unknown_arguments(
    parser: argparse.ArgumentParser, words: list[str], hint: Callable[[str], str] = lambda _flag: ""
) -> list[str]:
    """An error for each unknown flag, with the nearest known one. Values after an unknown flag are not reported.

    Args:
        words: arguments that the parser did not recognize.
        hint: what to print instead of the nearest flag; "" for no hint.
    """
    flags = [word for word in words if word.startswith("-")] or words
    names = [(word, word.split("=")[0]) for word in flags]
    known = list(parser._option_string_actions)
    return [f"unknown argument {one_line(word)}{hint(name) or nearest(name, known)}" for word, name in names]
