"""One option's value, from a command line's word or a JSON file: its type, its bounds, and what is wrong with it."""

import math
import re
from collections.abc import Callable
from typing import Any, get_args

from flare.config.options import FIELDS, SELECTIVE
from flare.errors import ConfigError, nearest, one_line
from flare.gpus.selection import parse_gpu_ids
from flare.nope.layers import parse_layers

KIND_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}
LENGTH = re.compile("[0-9]{1,9}")
AUTO_KINDS = {"switch": "bool", "count": "int"}
WORDS = {"switch": (SELECTIVE, "auto"), "count": ("auto",)}
"""Kinds that take words, auto among them; what else they take, and the words."""

OTHER_TOOLS = {
    "resume_from_checkpoint": ("resume", "PATH"),
    "bf16": ("precision", "bf16"),
    "fp16": ("precision", "fp16"),
    "mixed_precision": ("precision", "bf16"),
    "torch_compile": ("compile", ""),
    "train_file": ("dataset_name", "FILE"),
    "dataset": ("dataset_name", "NAME"),
    "block_size": ("max_seq_length", "N"),
    "cutoff_len": ("max_seq_length", "N"),
    "sequence_len": ("max_seq_length", "N"),
    "micro_batch_size": ("per_device_train_batch_size", "N"),
    "max_train_samples": ("dataset_size", "N"),
    "flash_attn": ("attn_implementation", "flash_attention_2"),
    "run_name": ("experiment_name", "NAME"),
    "fsdp": ("parallel", "fsdp"),
    "deepspeed": ("parallel", "fsdp"),
}
"""Options of HF's scripts, LLaMA-Factory and axolotl that look like none of ours: our name, and its value."""


def other_tools_name(name: str, dashes: str = "") -> str:
    """'; here it is OURS VALUE' for an option of ``OTHER_TOOLS``, else ''."""
    ours, value = OTHER_TOOLS.get(name, ("", ""))
    return f"; here it is {dashes}{ours} {value}".rstrip() if ours else ""


def checked(raw: dict[str, Any], label: Callable[[str], str], problems: list[str]) -> dict[str, Any]:
    """Values of the right type and within their bounds; each mistake becomes a line of ``problems``."""
    values = {}
    for name, value in raw.items():
        try:
            values[name] = check_value(name, value, label(name))
        except ConfigError as error:
            problems.append(str(error))
    return values


def check_value(name: str, value: Any, where: str) -> Any:
    """One option's value converted and checked against its field.

    Args:
        where: what the user calls it, ``--flag`` or the key of a file; errors begin with it.
    Raises: ConfigError.
    """
    rules = FIELDS[name].metadata
    kind = rules.get("kind", "str")
    if value is None and type(None) in get_args(FIELDS[name].type):
        return None
    if kind == "ids" and value is not None:
        return parse_gpu_ids(value, where)
    if kind == "layers" and value is not None:
        return _layer_words(value, where)
    try:
        return _plain_value(value, kind, rules, from_text=where.startswith("--"))
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from None


def _plain_value(value: Any, kind: str, rules: Any, from_text: bool) -> Any:
    """Raises: ConfigError that begins where the option's name ends ("must be ..., got ...")."""
    if kind == "lengths" and value is not None:
        return parse_lengths(value)
    if kind == "weights" and value is not None:
        return _weights(value)
    if kind in AUTO_KINDS:  # auto is settled when model and GPUs are known (flare.run.resolve)
        if value in WORDS[kind]:
            return value
        kind = AUTO_KINDS[kind]
    if from_text and kind != "str":
        value = _from_text(value, kind)
    if kind == "float" and type(value) is int:
        value = _as_float(value)
    if type(value).__name__ != kind:
        also = "".join(f" or {word}" for word in WORDS.get(rules.get("kind"), ()))
        raise ConfigError(f"must be {KIND_NAMES.get(kind, 'a list')}{also}, got {_shown(value)}")
    if kind == "str":
        _check_text(value)
    _check_bounds(value, rules)
    return value


def _shown(value: Any) -> str:
    """A wrong value as errors show it, on one line."""
    if value is None:
        return "null"
    return f'the string "{one_line(value)}"' if isinstance(value, str) else one_line(repr(value))


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _check_text(value: str) -> None:
    """Refuse what is no name of anything, and what no file of UTF-8 can record."""
    if not value:
        raise ConfigError("is empty; give a value or leave it out")
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(f"holds a character that is no text, got {value!r}")


def _layer_words(value: Any, where: str) -> list[str]:
    words = [str(word) for word in value] if isinstance(value, list) else str(value).split()
    if not words:
        raise ConfigError(f"{where} needs at least one layer, or none")
    plain = [w for w in words if w not in ("nope", "nope_attention")]
    if plain:
        # Syntax only: the real depth is known when the model's configuration is read.
        parse_layers(plain, 10_000, where)
    return words


def parse_lengths(value: Any) -> list[int]:
    """Token counts, ascending, none twice: ``"512,1024"``, words of such, or a list of numbers.

    Raises: ConfigError that begins where the option's name ends.
    """
    values = value if isinstance(value, list) else [value]
    words = [word for item in values for word in str(item).replace(",", " ").split()]
    bad = [word for word in words if not LENGTH.fullmatch(word) or int(word) < 2]
    if bad or not words:
        got = one_line((bad or [""])[0])
        raise ConfigError(f"must be token counts of 2 or more, as in 512,1024; got {got!r}")
    return sorted({int(word) for word in words})


def _weights(value: Any) -> list[float]:
    words = value if isinstance(value, list) else [value]
    try:
        weights = [float(part) for word in words for part in str(word).split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise ConfigError(f"must be numbers above 0, one for each data set (0.7,0.3); got {one_line(repr(value))}")
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
        raise ConfigError(
            f"must be one of {choices}; got {one_line(repr(value))}{nearest(str(value), map(str, rules['choices']))}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"must be a number, got {value}")
    for rule, wrong, words in (
        ("low", lambda v, b: v < b, ">="),
        ("above", lambda v, b: v <= b, ">"),
        ("high", lambda v, b: v > b, "<="),
        ("below", lambda v, b: v >= b, "<"),
    ):
        if rule in rules and wrong(value, rules[rule]):
            raise ConfigError(f"must be {words} {rules[rule]}, got {one_line(str(value))}")
