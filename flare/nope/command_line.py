"""The command line of patch_qwen_rope.py: its flags, its modes, and which flags a mode makes use of. No torch."""

import argparse

from flare.argument_parser import OneLineParser
from flare.errors import ConfigError, join_errors

DESCRIPTION = "Remove RoPE from chosen layers of a Qwen checkpoint on disk, and take the result elsewhere."
EXAMPLES = """\
examples (patch, look, prove, export, undo):
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
    "export": ({"export", "model_name_or_path", "output_dir"}, set()),
    "verify_endpoint": ({"verify_endpoint", "model_name_or_path"}, {"served_model_name"}),
    "restore_rope": ({"restore_rope", "model_name_or_path", "output_dir"}, set()),
    "patch": ({"model_name_or_path", "output_dir"}, {"no_rope_layers", "rope_theta", "nope_temperature"}),
}
"""Mode -> the flags that it needs, and those that it takes; every other flag would have no effect there."""


def build_parser() -> argparse.ArgumentParser:
    """The parser; flags that were not given are not in its result."""
    parser = OneLineParser(
        "patch_qwen_rope.py",
        "--model_name_or_path DIR --output_dir OUT [flags]\n       patch_qwen_rope.py --inspect DIR | --verify DIR",
        DESCRIPTION,
        EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument_group("from what to where").add_argument
    add("--model_name_or_path", metavar="DIR", help="directory or hub name of the model")
    add("--output_dir", metavar="OUT", help="new directory for the result; weights are hard links where unchanged")
    patch = parser.add_argument_group("patch (the default)")
    add = patch.add_argument
    add(
        "--no_rope_layers", nargs="+", metavar="LAYER",
        help="indices and ranges (3 7 20-32), every:4, or auto (the band 20-32 of 36, scaled) [auto]",
    )  # fmt: skip
    add("--rope_theta", type=float, metavar="X", help="RoPE base of the other layers [the model's]")
    add(
        "--nope_temperature", type=float, metavar="BETA",
        help="multiply the attention scores of the NoPE layers by BETA (above 1: sharper), folded into q_proj (Qwen2) "
        "or q_norm (Qwen3); exact for powers of two, else up to one rounding of the stored dtype. Training has no "
        "such flag: it starts from the patched checkpoint",
    )  # fmt: skip
    other = parser.add_argument_group("instead of patching, one of")
    add = other.add_argument
    add("--inspect", metavar="DIR", help="say what a model directory is, from its config.json")
    add("--verify", metavar="DIR", help="load a model (patched, exported or plain) and prove that it is that")
    add(
        "--export", choices=("native",), metavar="native",
        help="write a patched model as SmolLM3 (Qwen2, Qwen2.5) or ExaoneMoe (Qwen3), for runtimes without our code; "
        "reloaded and compared bitwise before it is done",
    )  # fmt: skip
    add(
        "--verify_endpoint", metavar="URL",
        help="ask a completions server (vLLM, SGLang, llama.cpp) which model it runs: that of --model_name_or_path, "
        "whose nope_canary.json is read, the same weights with RoPE everywhere, or neither",
    )  # fmt: skip
    add("--served_model_name", metavar="NAME", help="with --verify_endpoint: the server's name for it [its only one]")
    add("--restore_rope", action="store_true", help="write a patched or exported model as plain Qwen again")
    return parser


def choose_mode(given: dict) -> str:
    """The mode that the flags ask for. Raises: ConfigError for two modes, a missing flag or one without effect."""
    asked = [mode for mode in MODES if mode in given]
    if len(asked) > 1:
        raise ConfigError(f"--{asked[0]} and --{asked[1]} exclude each other; run them one after the other")
    mode = asked[0] if asked else "patch"
    needed, taken = MODES[mode]
    name = (
        f"--{mode}" if asked else "patching (or give --inspect, --verify, --verify_endpoint, --export, --restore_rope)"
    )
    problems = [f"{name} needs --{flag}" for flag in sorted(needed - given.keys())]
    problems += [f"{name} makes no use of --{flag}; leave it out" for flag in sorted(given.keys() - needed - taken)]
    if problems:
        raise ConfigError(join_errors(problems))
    return mode
