"""Values of options: conversion from text or JSON to the type of the field, and checks against its limits."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flare.errors import ConfigError, nearest, one_line
from flare.option_fields import OptionField

TYPE_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def check_values(
    fields: Mapping[str, OptionField],
    raw: Mapping[str, Any],
    label: Callable[[str], str],
    problems: list[str],
    from_text: bool = False,
) -> dict[str, Any]:
    """Converted values of all valid options in ``raw``; each mistake becomes a line of ``problems``.

    Args:
        label: turns an option's name into what the user typed, ``--flag`` or the key of a file.
        from_text: the values are words of a command line, not of a JSON file.
    """
    values = {}
    for name, value in raw.items():
        try:
            values[name] = check_value(fields[name], value, label(name), from_text)
        except ConfigError as error:
            problems.append(str(error))
    return values


def check_value(field: OptionField, value: Any, where: str, from_text: bool = False) -> Any:
    """The value converted to the type of the option and checked against its limits.

    Raises: ConfigError that begins with ``where``.
    """
    if value is None and field.accepts_none:
        return None
    if field.parse and value is not None:
        return field.parse(value, where)
    if field.words and value in field.words:
        return value
    if from_text and field.kind != "str":
        value = _from_text(value, field.kind)
    if field.kind == "float" and type(value) is int:
        value = _as_float(value)
    if type(value).__name__ != field.kind:
        expected = " or ".join([TYPE_NAMES.get(field.kind, "a list"), *field.words])
        raise ConfigError(f"{where} must be {expected}, got {_shown(value)}")
    if field.kind == "str":
        _check_text(value, where)
    _check_limits(field, value, where)
    return value


def parse_words(value: Any, where: str) -> tuple[str, ...]:
    """Parser of an option that takes several texts. Raises: ConfigError when there is none."""
    words = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not words or "" in words:
        raise ConfigError(f"{where} needs at least one value, none of them empty")
    return words


def parse_path(value: Any, where: str) -> Path:
    """Parser of an option that is a path. Raises: ConfigError for an empty or impossible one."""
    if not isinstance(value, str):
        raise ConfigError(f"{where} must be a path, got {_shown(value)}")
    _check_text(value, where)
    return Path(value)


def _from_text(word: str, kind: str) -> Any:
    """The value that a word of the command line means; the word itself when it has another type."""
    if kind == "bool":
        return BOOLEANS.get(word.lower(), word)
    try:
        return {"int": int, "float": float}[kind](word)
    except ValueError:
        return word


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _shown(value: Any) -> str:
    """A wrong value as errors show it, on one line."""
    if value is None:
        return "null"
    return f'the string "{one_line(value)}"' if isinstance(value, str) else one_line(repr(value))


def _check_text(value: str, where: str) -> None:
    """Raises: ConfigError for an empty text, and for characters that file names or UTF-8 files cannot contain."""
    if not value:
        raise ConfigError(f"{where} is empty; give a value or leave it out")
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(f"{where} contains a character that is not valid text, got {value!r}")


def _check_limits(field: OptionField, value: Any, where: str) -> None:
    if field.choices and value not in field.choices:
        choices = [str(choice) for choice in field.choices]
        hint = nearest(str(value), choices)
        raise ConfigError(f"{where} must be one of {', '.join(choices)}; got {one_line(repr(value))}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} must be a number, got {value}")
    for limit, sign, is_wrong in (
        (field.ge, ">=", lambda bound: value < bound),
        (field.gt, ">", lambda bound: value <= bound),
        (field.le, "<=", lambda bound: value > bound),
        (field.lt, "<", lambda bound: value >= bound),
    ):
        if limit is not None and is_wrong(limit):
            raise ConfigError(f"{where} must be {sign} {limit}, got {one_line(str(value))}")
