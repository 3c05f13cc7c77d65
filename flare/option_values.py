"""One option's value, from a command line's word or a JSON file: its type, its bounds, and what is wrong with it."""

import math
from collections.abc import Callable
from typing import Any

from flare.errors import ConfigError, nearest
from flare.gpus import parse_gpu_ids
from flare.nope.layers import parse_layers
from flare.options import FIELDS, SELECTIVE

KIND_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}
AUTO_KINDS = {"switch": "bool", "count": "int"}
WORDS = {"switch": (SELECTIVE, "auto"), "count": ("auto",)}
"""Kinds that take words, auto among them; what else they take, and the words."""


def checked(raw: dict[str, Any], label: Callable[[str], str], problems: list[str]) -> dict[str, Any]:
    """Values of the right type and within their bounds; each mistake becomes a line of ``problems``."""
    values = {}
    for name, value in raw.items():
        try:
            values[name] = check_value(name, value, from_text=label(name).startswith("--"))
        except ConfigError as error:
            space = "" if str(error).startswith(":") else " "  # parse_layers puts a colon behind its flag
            problems.append(f"{label(name)}{space}{error}")
    return values


def check_value(name: str, value: Any, from_text: bool = False) -> Any:
    """One option's value converted and checked against its field.

    Raises: ConfigError that begins where the option's name ends ("must be ..., got ...").
    """
    rules = FIELDS[name].metadata
    kind = rules.get("kind", "str")
    if value is None:
        return None
    if kind == "ids":
        return parse_gpu_ids(value)
    if kind == "layers":
        return _layer_words(value)
    if kind == "lengths":
        return parse_lengths(value)
    if kind == "weights":
        return _weights(value)
    if kind in AUTO_KINDS:  # auto is settled when model and cards are known (flare.setup)
        if value in WORDS[kind]:
            return value
        kind = AUTO_KINDS[kind]
    if from_text and kind != "str":
        value = _from_text(value, kind)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value).__name__ != kind:
        shown = f'the string "{value}"' if isinstance(value, str) else repr(value)
        also = "".join(f" or {word}" for word in WORDS.get(rules.get("kind"), ()))
        raise ConfigError(f"must be {KIND_NAMES[kind]}{also}, got {shown}")
    _check_bounds(value, rules)
    return value


def _layer_words(value: Any) -> list[str]:
    words = [str(word) for word in value] if isinstance(value, list) else str(value).split()
    if not words:
        raise ConfigError("needs at least one layer, or none")
    plain = [w for w in words if w not in ("nope", "nope_attention")]
    if plain:
        # Syntax only: the real depth is known when the model's configuration is read.
        parse_layers(plain, 10_000, "").copy()
    return words


def parse_lengths(value: Any) -> list[int]:
    """Token counts, ascending, none twice: ``"512,1024"``, words of such, or a list of numbers.

    Raises: ConfigError that begins where the option's name ends.
    """
    values = value if isinstance(value, list) else [value]
    words = [word for item in values for word in str(item).replace(",", " ").split()]
    bad = [word for word in words if not word.isdecimal() or int(word) < 2]
    if bad or not words:
        raise ConfigError(f"must be token counts of 2 or more, as in 512,1024; got {(bad or [''])[0]!r}")
    return sorted({int(word) for word in words})


def _weights(value: Any) -> list[float]:
    words = value if isinstance(value, list) else [value]
    try:
        weights = [float(part) for word in words for part in str(word).split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise ConfigError(f"must be numbers above 0, one for each data set (0.7,0.3); got {value!r}")
    return weights


def _from_text(value: str, kind: str) -> Any:
    """A typed value of a command-line word; the word itself when it is none, for the type error."""
    if kind == "bool":
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
            value.lower(), value
        )
    try:
        return {"int": int, "float": float}[kind](value)
    except ValueError:
        return value


def _check_bounds(value: Any, rules: Any) -> None:
    if "choices" in rules and value not in rules["choices"]:
        choices = ", ".join(str(c) for c in rules["choices"])
        raise ConfigError(f"must be one of {choices}; got {value!r}{nearest(str(value), map(str, rules['choices']))}")
    if value != value:
        raise ConfigError("must be a number, got nan")
    for rule, wrong, words in (
        ("low", lambda v, b: v < b, ">="),
        ("above", lambda v, b: v <= b, ">"),
        ("high", lambda v, b: v > b, "<="),
        ("below", lambda v, b: v >= b, "<"),
    ):
        if rule in rules and wrong(value, rules[rule]):
            raise ConfigError(f"must be {words} {rules[rule]}, got {value}")
