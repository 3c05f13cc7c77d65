#!/usr/bin/env python3
"""Remove RoPE from chosen layers of a Qwen checkpoint on disk; importable: patch_qwen_rope, verify_nope.

python patch_qwen_rope.py --model_name_or_path DIR --no_rope_layers 20-32 --output_dir OUT
python patch_qwen_rope.py --inspect OUT
python patch_qwen_rope.py --verify_endpoint http://localhost:8000 --model_name_or_path DIR
"""

import argparse
import json
import sys
from pathlib import Path

from flare.errors import ConfigError, FlareError, run_script


def __getattr__(name: str):
    """``from patch_qwen_rope import patch_qwen_rope``, with torch imported only when that is asked for."""
    if name == "patch_qwen_rope":
        from flare.nope.patch import patch_qwen_rope

        return patch_qwen_rope
    if name == "verify_nope":
        from flare.nope.probe import verify_nope

        return verify_nope
    raise AttributeError(name)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", metavar="DIR", help="directory or hub name of the plain model")
    parser.add_argument(
        "--no_rope_layers", nargs="+", default=["auto"], metavar="LAYER",
        help="indices and ranges (3 7 20-32), every:4, or auto (the band 20-32 of 36, scaled) [auto]",
    )  # fmt: skip
    parser.add_argument("--rope_theta", type=float, metavar="X", help="RoPE base of the other layers [the model's]")
    parser.add_argument("--output_dir", metavar="OUT", help="where the patched checkpoint goes")
    parser.add_argument("--inspect", metavar="DIR", help="say what a model directory is")
    parser.add_argument(
        "--verify_endpoint", metavar="URL",
        help="ask a completions server (vLLM, SGLang, llama.cpp) whether it runs the model of --model_name_or_path, "
        "which has a nope_canary.json: the true model, the one with RoPE everywhere, or neither",
    )  # fmt: skip
    parser.add_argument(
        "--served_model_name", metavar="NAME", help="as --verify_endpoint's server calls it [its only]"
    )
    return parser


def inspect(directory: Path) -> None:
    """Print family, layers, NoPE layers, theta and trained tokens, one a line."""
    from flare.hub import read_model_config
    from flare.nope.format import family_of, nope_layers_of, theta_of
    from flare.nope.layers import format_layers

    config = read_model_config(directory)
    facts = {
        "family": family_of(config, str(directory)),
        "model_type": config["model_type"],
        "layers": config["num_hidden_layers"],
        "NoPE layers": format_layers(nope_layers_of(config)),
        "rope_theta": f"{theta_of(config, str(directory)):g}",
    }
    facts |= {name.replace("_", " "): value for name, value in (config.get("flare") or {}).items()}
    for name, value in facts.items():
        print(f"{name + ':':<20}{value if isinstance(value, str | int) else json.dumps(value)}")


def verify_server(url: str, directory: str | None, served_model_name: str | None) -> int:
    """Print which model a server runs. Returns: the exit code, 0 for the true model."""
    from flare.nope.canary_file import read_canary
    from flare.nope.endpoint import verify_endpoint

    if not directory:
        raise ConfigError("--verify_endpoint needs --model_name_or_path DIR, a model with a nope_canary.json")
    verdict = verify_endpoint(url, read_canary(Path(directory)), served_model_name)
    print(f"{url} runs: {verdict}")
    return 0 if verdict.is_true_model else FlareError.exit_code


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.served_model_name and not args.verify_endpoint:
        raise ConfigError("--served_model_name is for --verify_endpoint")
    if args.inspect:
        inspect(Path(args.inspect))
        return 0
    if args.verify_endpoint:
        return verify_server(args.verify_endpoint, args.model_name_or_path, args.served_model_name)
    if not args.model_name_or_path or not args.output_dir:
        raise ConfigError("give --model_name_or_path and --output_dir, or --inspect DIR, or --verify_endpoint URL")
    from flare.hub import local_model_dir
    from flare.nope.layers import format_layers
    from flare.nope.patch import patch_checkpoint

    source = local_model_dir(args.model_name_or_path)
    layers = patch_checkpoint(source, Path(args.output_dir), args.no_rope_layers, args.rope_theta)
    print(f"{args.output_dir}: NoPE layers {format_layers(layers)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
