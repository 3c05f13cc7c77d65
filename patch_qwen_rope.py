#!/usr/bin/env python3
"""Remove RoPE from chosen layers of a Qwen checkpoint on disk, and take the result elsewhere.

Importable, too: patch_qwen_rope (a loaded model), verify_nope.
"""

import argparse
import sys
from pathlib import Path

from flare.errors import FlareError, run_script
from flare.logs import quiet_torchao
from flare.nope.command_line import build_parser, choose_mode


def __getattr__(name: str):
    """``from patch_qwen_rope import patch_qwen_rope``, with torch imported only when that is asked for."""
    if name == "patch_qwen_rope":
        from flare.nope.patch import patch_qwen_rope

        return patch_qwen_rope
    if name == "verify_nope":
        from flare.nope.probe import verify_nope

        return verify_nope
    raise AttributeError(name)


def run_patch(args: argparse.Namespace, source: Path, target: Path) -> None:
    from flare.nope.layers import format_layers
    from flare.nope.patch import patch_checkpoint

    layers = getattr(args, "no_rope_layers", ["auto"])
    temperature = getattr(args, "nope_temperature", None)
    patched = patch_checkpoint(source, target, layers, getattr(args, "rope_theta", None), temperature)
    folded = f", their attention scores times {temperature:g}" if temperature is not None else ""
    print(f"{target}: NoPE layers {format_layers(patched)}{folded}")


def run_export(source: Path, target: Path) -> None:
    from flare.nope.export.export import export_native
    from flare.nope.export.model_card import gguf_limits

    config, compared = export_native(source, target)
    print(f"{target}: {config['architectures'][0]}; {compared}")
    print(f"llama.cpp (GGUF): {gguf_limits(config)}")


def run_restore(source: Path, target: Path) -> None:
    from flare.nope.export.export import restore_rope

    config = restore_rope(source, target)
    print(
        f"{target}: {config['architectures'][0]} with RoPE in every layer. Weights trained without RoPE now get RoPE: "
        "this is not the model that was trained"
    )


def run_endpoint(args: argparse.Namespace) -> int:
    """Print which model a server runs. Returns: the exit code, 0 for the true model."""
    from flare.nope.canary.endpoint import verify_endpoint
    from flare.nope.canary.file import read_canary

    canary = read_canary(Path(args.model_name_or_path))
    verdict = verify_endpoint(args.verify_endpoint, canary, getattr(args, "served_model_name", None))
    print(f"{args.verify_endpoint} runs: {verdict}")
    return 0 if verdict.is_true_model else FlareError.exit_code


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    mode = choose_mode(vars(args))
    quiet_torchao()
    if mode in ("inspect", "verify"):
        from flare.nope.export.verify import model_facts, verify_directory

        directory = Path(getattr(args, mode))
        for name, value in model_facts(directory).items():
            print(f"{name + ':':<20}{value}")
        for line in verify_directory(directory) if mode == "verify" else ():
            print(line)
        return 0
    if mode == "verify_endpoint":
        return run_endpoint(args)
    from flare.hub import local_model_dir

    source, target = local_model_dir(args.model_name_or_path), Path(args.output_dir)
    if mode == "patch":
        run_patch(args, source, target)
    else:
        (run_export if mode == "export" else run_restore)(source, target)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
