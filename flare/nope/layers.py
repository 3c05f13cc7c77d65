"""Parses and formats the layer specs that users type. Pure functions, no torch."""

import re
from collections import Counter

from flare.errors import ConfigError, one_line
from flare.index_ranges import format_ranges

EVERY = re.compile(r"every:([0-9]{1,9})")
RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def parse_layers(spec: str | int | list, num_hidden_layers: int, flag: str = "--no_rope_layers") -> list[int]:
    """Parse a layer spec into sorted layer indices.

    ``spec`` is one or several of: an index (``20``), a range that includes both ends (``20-32``),
    ``every:4`` (layers 3, 7, 11, ... as SmolLM3 does), or one of these words
    alone: ``auto`` (the guide's band 20..32 of 36 layers, scaled to this depth), ``none``, ``all``.

    Raises:
        ConfigError: a layer that the model does not have, a reversed range, a repeated layer, an unknown word.
    """
    words = _words(spec)
    if len(words) == 1 and words[0] in WHOLE_SPECS:
        return WHOLE_SPECS[words[0]](num_hidden_layers)
    layers: list[int] = []
    for word in words:
        layers += _parse_word(word, num_hidden_layers, flag)
    repeated = sorted(i for i, count in Counter(layers).items() if count > 1)
    if repeated:
        raise ConfigError(f"{flag}: layer {repeated[0]} is named twice in {one_line(' '.join(words))!r}")
    if not layers:
        raise ConfigError(f"{flag} names no layer; give indices, 20-32, every:4, auto or none")
    return sorted(layers)


def auto_band(num_hidden_layers: int) -> list[int]:
    """The guide's band, layers 20..32 of Qwen2.5-3B's 36, at the same relative depth of another model."""
    first = round(20 * num_hidden_layers / 36)
    last = min(num_hidden_layers - 1, round(32 * num_hidden_layers / 36))
    return list(range(first, last + 1))


WHOLE_SPECS = {
    "auto": auto_band,
    "none": lambda _depth: [],
    "all": lambda depth: list(range(depth)),
}


def _words(spec: str | int | list) -> list[str]:
    items = spec if isinstance(spec, list | tuple) else [spec]
    return [word for item in items for word in str(item).replace(",", " ").split()]


def _parse_word(word: str, depth: int, flag: str) -> list[int]:
    if match := EVERY.fullmatch(word):
        period = int(match[1])
        layers = list(range(period - 1, depth, period)) if period > 0 else []
        if period == 0:
            raise ConfigError(f"{flag} {word}: the N of every:N must be at least 1")
        if not layers:
            raise ConfigError(f"{flag} {word} matches no layer of a model with {depth} layers")
        return layers
    match = RANGE.fullmatch(word)
    if match is None:
        hint = "; 'auto', 'none' and 'all' stand alone" if word in WHOLE_SPECS else ""
        raise ConfigError(f"{flag}: cannot read {one_line(word)!r}; give indices, 20-32, every:4, auto or none{hint}")
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise ConfigError(f"{flag}: layer range {word} is reversed")
    if last >= depth:
        wrong = first if first >= depth else last
        raise ConfigError(f"{flag}: layer {wrong} is out of range; the model has layers 0-{depth - 1}")
    return list(range(first, last + 1))


def format_layers(layers: list[int]) -> str:
    """Layers as people write them: ``3 7 20-32``; ``none`` for an empty list."""
    return format_ranges(layers, " ") or "none"
