"""The options of patch_qwen_rope.py, each declared once, and the modes that they select. No torch."""

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from flare.argument_parser import OneLineParser, add_options, parse_options
from flare.errors import ConfigError, join_errors
from flare.option_fields import option, option_fields
from flare.option_values import parse_words

DESCRIPTION = "Remove RoPE from chosen layers of a Qwen checkpoint on disk, and inspect, verify or export the result."
EXAMPLES = """\
examples (patch, inspect, verify, export, undo):
  python patch_qwen_rope.py --model_name_or_path Qwen/Qwen2.5-3B \\
      --no_rope_layers 20-32 --output_dir patched
  python patch_qwen_rope.py --inspect patched
  python patch_qwen_rope.py --verify patched
  python patch_qwen_rope.py --export native --model_name_or_path patched \\
      --output_dir native
  python patch_qwen_rope.py --restore_rope --model_name_or_path native \\
      --output_dir plain
"""

MODES = {
    "inspect": ({"inspect"}, set()),
    "verify": ({"verify"}, set()),
    "refresh": ({"refresh"}, set()),
    "export": ({"export", "model_name_or_path", "output_dir"}, set()),
    "verify_endpoint": ({"verify_endpoint", "model_name_or_path"}, {"served_model_name"}),
    "restore_rope": ({"restore_rope", "model_name_or_path", "output_dir"}, set()),
    "patch": ({"model_name_or_path", "output_dir"}, {"no_rope_layers", "rope_theta", "nope_temperature"}),
}
"""Mode -> (required flags, optional flags). Every other flag would have no effect and is an error."""

path_option = partial(option, group="input and output")
patch_option = partial(option, group="patch (the default)")
mode_option = partial(option, group="instead of patching, one of")


def parse_layer_specs(value: Any, where: str) -> list[str]:
    """Words of ``--no_rope_layers``; patching checks them against the depth of the model. Raises: ConfigError."""
    return list(parse_words(value, where))


@dataclass(frozen=True)
class PatchOptions:
    """The options of patch_qwen_rope.py. ``None`` means not set."""

    model_name_or_path: str | None = path_option("directory or hub name of the model", None, metavar="DIR")
    output_dir: str | None = path_option(
        "new directory for the result; unchanged weight files become hard links", None, metavar="OUT"
    )

    no_rope_layers: list[str] = patch_option(
        "NoPE layers: indices and ranges (3 7 20-32), every:4 (layers 3, 7, 11, ...), or auto (layers 20-32 of 36, "
        "scaled to the depth of the model)",
        ["auto"],
        parse=parse_layer_specs,
        metavar="LAYER",
    )
    rope_theta: float | None = patch_option(
        "RoPE base of the layers that keep RoPE", None, gt=0, default_help="the model's own"
    )
    nope_temperature: float | None = patch_option(
        "factor on the attention scores of the NoPE layers, multiplied into q_proj (Qwen2) or q_norm (Qwen3); above 1 "
        "attention is sharper. Exact for powers of two, otherwise rounded once in the dtype of the weights. Training "
        "has no such flag: start it from the patched checkpoint",
        None,
        gt=0,
        metavar="BETA",
        default_help="1, no change",
    )

    inspect: str | None = mode_option(
        "print what a model directory contains, from its config.json", None, metavar="DIR"
    )
    verify: str | None = mode_option(
        "load a model (patched, exported or plain) and check from its outputs which layers use RoPE",
        None,
        metavar="DIR",
    )
    export: str | None = mode_option(
        "write a patched model as SmolLM3 (Qwen2, Qwen2.5) or ExaoneMoe (Qwen3), for programs without Flare's code; "
        "the result is loaded again and its outputs must be bitwise equal",
        None,
        choices=("native",),
        metavar="native",
    )
    refresh: str | None = mode_option(
        "replace modeling_nope.py of a model from an older Flare by the current file; nothing else changes",
        None,
        metavar="DIR",
    )
    verify_endpoint: str | None = mode_option(
        "check which model a completions server (vLLM, SGLang, llama.cpp) runs: the one of --model_name_or_path, "
        "whose nope_canary.json is read, the same weights with RoPE in every layer, or neither",
        None,
        metavar="URL",
    )
    served_model_name: str | None = mode_option(
        "with --verify_endpoint: name of the model on the server", None, metavar="NAME", default_help="its only model"
    )
    restore_rope: bool = mode_option("write a patched or exported model as plain Qwen with RoPE in every layer", False)


FIELDS = option_fields(PatchOptions)


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``patch_qwen_rope.py``."""
    parser = OneLineParser(
        "patch_qwen_rope.py",
        "--model_name_or_path DIR --output_dir OUT [flags]\n       patch_qwen_rope.py --inspect DIR | --verify DIR",
        DESCRIPTION,
        EXAMPLES,
    )
    add_options(parser, FIELDS)
    return parser


def parse_command_line(argv: list[str]) -> tuple[str, PatchOptions]:
    """(mode, options) of a command line. Raises: ConfigError."""
    values = parse_options(build_parser(), FIELDS, argv)
    return choose_mode([name for name, value in values.items() if value is not False]), PatchOptions(**values)


def choose_mode(flags: Collection[str]) -> str:
    """The mode that the flags select.

    Raises: ConfigError for two modes, a missing flag or a flag without effect.
    """
    selected = [mode for mode in MODES if mode in flags]
    if len(selected) > 1:
        raise ConfigError(f"--{selected[0]} and --{selected[1]} exclude each other; run them one after the other")
    mode = selected[0] if selected else "patch"
    required, optional = MODES[mode]
    modes = ", ".join(f"--{name}" for name in MODES if name != "patch")
    name = f"--{mode}" if selected else f"patching (or give one of {modes})"
    problems = [f"{name} needs --{flag}" for flag in sorted(required - set(flags))]
    problems += [f"{name} does not use --{flag}; leave it out" for flag in sorted(set(flags) - required - optional)]
    if problems:
        raise ConfigError(join_errors(problems))
    return mode
