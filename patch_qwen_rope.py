#!/usr/bin/env python3
"""Remove RoPE from chosen layers of a Qwen checkpoint on disk, and inspect, verify or export the result.

Also a module: ``patch_qwen_rope`` patches a loaded model, ``verify_nope`` checks one.
"""

import sys
from pathlib import Path

from flare.errors import FlareError, run_script
from flare.logs import quiet_torchao
from flare.nope.command_line import PatchOptions, parse_command_line


def __getattr__(name: str):
    """``from patch_qwen_rope import patch_qwen_rope``, which imports torch, unlike ``--help``."""
    if name == "patch_qwen_rope":
        from flare.nope.patch import patch_qwen_rope

        return patch_qwen_rope
    if name == "verify_nope":
        from flare.nope.probe import verify_nope

        return verify_nope
    raise AttributeError(name)


def run_patch(options: PatchOptions, source: Path, target: Path) -> None:
    from flare.nope.layers import format_layers
    from flare.nope.patch import patch_checkpoint

    temperature = options.nope_temperature
    patched = patch_checkpoint(source, target, options.no_rope_layers, options.rope_theta, temperature)
    scaled = f", their attention scores times {temperature:g}" if temperature is not None else ""
    print(f"{target}: NoPE layers {format_layers(patched)}{scaled}")


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
        f"{target}: {config['architectures'][0]} with RoPE in every layer. Weights that were trained without "
        "RoPE now run with it, so this is not the model that was trained"
    )


def run_refresh(directory: Path) -> int:
    from flare.nope.refresh import refresh_modeling_file

    changed = refresh_modeling_file(directory)
    print(f"{directory}: modeling_nope.py {'replaced by the current file' if changed else 'is already current'}")
    return 0


def run_endpoint(options: PatchOptions) -> int:
    """Print which model a server runs. Returns: the exit code, 0 for the true model."""
    from flare.nope.canary.endpoint import verify_endpoint
    from flare.nope.canary.file import read_canary

    canary = read_canary(Path(options.model_name_or_path))
    verdict = verify_endpoint(options.verify_endpoint, canary, options.served_model_name)
    print(f"{options.verify_endpoint} runs: {verdict}")
    return 0 if verdict.is_true_model else FlareError.exit_code


def main(argv: list[str] | None = None) -> int:
    mode, options = parse_command_line(sys.argv[1:] if argv is None else argv)
    quiet_torchao()
    if mode in ("inspect", "verify"):
        from flare.nope.export.verify import model_facts, verify_directory

        directory = Path(getattr(options, mode))
        for name, value in model_facts(directory).items():
            print(f"{name + ':':<20}{value}")
        for line in verify_directory(directory) if mode == "verify" else ():
            print(line)
        return 0
    if mode == "refresh":
        return run_refresh(Path(str(options.refresh)))
    if mode == "verify_endpoint":
        return run_endpoint(options)
    from flare.hub import local_model_dir

    source, target = local_model_dir(options.model_name_or_path), Path(options.output_dir)
    if mode == "patch":
        run_patch(options, source, target)
    else:
        (run_export if mode == "export" else run_restore)(source, target)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
