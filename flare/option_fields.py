"""Options of a command, each declared once as a dataclass field.

``option()`` gives a field its help text, help group and limits; type and default are those of the field itself.
The parser and its help (argument_parser.py), the validation (option_values.py) and docs/options.md derive from it.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

PLAIN_TYPES = {bool: "bool", int: "int", float: "float", str: "str"}
METAVARS = {"bool": "BOOL", "int": "N", "float": "X", "str": "TEXT", "list": "VALUE", "other": "VALUE"}


@dataclass(frozen=True, kw_only=True)
class OptionField:
    """One option.

    Args:
        help: what the option does, without its default.
        group: heading of the option in ``--help``.
        section: section of the JSON configuration file; empty for options that no file can set.
        default_help: the default in words, where the value itself (None, for example) says too little.
        choices: the only values allowed.
        words: words that a number or a switch accepts besides its type: ``auto``.
        parse: ``parse(value, where)`` for values that are not a plain number, switch or text. Its ConfigError begins
            with ``where``.
        metavar: placeholder of the value in help.
        ge, gt, le, lt: limits of a number, named as in pydantic.
        kind: "bool", "int", "float", "str", "list" for several values, or "other"; the last two have a ``parse``.
    """

    help: str
    group: str
    section: str = ""
    default_help: str = ""
    choices: tuple = ()
    words: tuple[str, ...] = ()
    parse: Callable[[Any, str], Any] | None = None
    metavar: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    name: str = ""
    kind: str = "str"
    accepts_none: bool = False
    is_required: bool = False
    default: Any = None

    @property
    def value_name(self) -> str:
        """Placeholder of the value in help: ``N``, ``N|auto``, ``{document,concat}``."""
        if self.choices and not self.metavar:
            return "{" + ",".join(map(str, self.choices)) + "}"
        return self.metavar or "|".join([METAVARS[self.kind], *self.words])

    @property
    def full_help(self) -> str:
        """The help text with the default: "Seed of the row order (default: 42)"."""
        shown = self.default_help or _shown_default(self.default)
        return f"{self.help} (default: {shown})" if shown else self.help


def _shown_default(default: Any) -> str:
    """The default as a user would type it; empty when there is none."""
    if default is None or default == ():
        return ""
    if isinstance(default, list | tuple):
        return " ".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def option(help: str, default: Any = MISSING, **settings: Any) -> Any:
    """A dataclass field that is an option; without a default it is required.

    Args:
        settings: those of ``OptionField``.
    """
    metadata = {"option": OptionField(help=help, **settings)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def option_fields(options_class: type) -> dict[str, OptionField]:
    """The options of a dataclass by name, in their order. Fields without ``option()`` are left out."""
    return {f.name: _complete(f) for f in fields(options_class) if "option" in f.metadata}


def _complete(dataclass_field: Any) -> OptionField:
    """The declared option with name, type and default of its dataclass field."""
    declared: OptionField = dataclass_field.metadata["option"]
    annotation = dataclass_field.type
    types = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    values = [t for t in types if t is not NoneType and not (declared.words and t is str)]
    is_list = values[0] in (list, tuple) or get_origin(values[0]) in (list, tuple)
    kind = "list" if is_list else PLAIN_TYPES.get(values[0], "other")
    has_parser = kind in PLAIN_TYPES.values() or declared.parse is not None
    assert len(values) == 1 and has_parser, f"{dataclass_field.name}: {annotation}"
    has_factory = dataclass_field.default_factory is not MISSING
    default = dataclass_field.default_factory() if has_factory else dataclass_field.default
    is_required = default is MISSING
    return replace(
        declared, name=dataclass_field.name, kind=kind, accepts_none=NoneType in types, is_required=is_required,
        default=None if is_required else default,
    )  # fmt: skip
