"""Parsers of training options that are lists, and the names that other tools use for our options."""

import math
import re
from typing import Any

from flare.errors import ConfigError, one_line
from flare.nope.layers import parse_layers

LENGTH = re.compile("[0-9]{1,9}")
MAX_LAYERS = 10_000
"""Above the depth of any model. The real depth is checked when the model's configuration is read."""

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
"""Options of HF's scripts, LLaMA-Factory and axolotl with a name unlike ours: our name, and its value."""


def other_tools_name(name: str, dashes: str = "") -> str:
    """'; in Flare: OURS VALUE' for an option of ``OTHER_TOOLS``, else ''."""
    ours, value = OTHER_TOOLS.get(name, ("", ""))
    return f"; in Flare: {dashes}{ours} {value}".rstrip() if ours else ""


def parse_layer_words(value: Any, where: str) -> list[str]:
    """The words of ``--no_rope_layers`` and ``--train_layers``, with their syntax checked.

    Raises: ConfigError.
    """
    words = [str(word) for word in value] if isinstance(value, list) else str(value).split()
    if not words:
        raise ConfigError(f"{where} needs at least one layer, or none")
    layers = [word for word in words if word not in ("nope", "nope_attention")]
    if layers:
        parse_layers(layers, MAX_LAYERS, where)
    return words


def parse_lengths(value: Any, where: str) -> list[int]:
    """Token counts in ascending order without repetition: ``"512,1024"``, a list of such texts, or of numbers.

    Raises: ConfigError.
    """
    values = value if isinstance(value, list | tuple) else [value]
    words = [word for item in values for word in str(item).replace(",", " ").split()]
    wrong = [word for word in words if not LENGTH.fullmatch(word) or int(word) < 2]
    if wrong or not words:
        got = one_line((wrong or [""])[0])
        raise ConfigError(f"{where} must be token counts of 2 or more, as in 512,1024; got {got!r}")
    return sorted({int(word) for word in words})


def parse_weights(value: Any, where: str) -> list[float]:
    """Shares of several data sets: ``"0.7,0.3"``, a list of such texts, or of numbers. Raises: ConfigError."""
    words = value if isinstance(value, list) else [value]
    try:
        weights = [float(part) for word in words for part in str(word).split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 < weight < math.inf for weight in weights):
        got = one_line(repr(value))
        raise ConfigError(f"{where} must be numbers above 0, one for each data set (0.7,0.3); got {got}")
    return weights
