"""Exports a NoPE model for runtimes without our code, and restores a plain Qwen model. Directories are atomic."""

from pathlib import Path

from flare.errors import ConfigError
from flare.hub import read_model_config
from flare.nope.canary.file import copy_canary
from flare.nope.config_json import family_of, is_export, nope_layers_of, with_nope, write_config
from flare.nope.export.bit_equality import Comparison, compare_with_export
from flare.nope.export.model_card import export_card
from flare.nope.export.native import from_native, to_native
from flare.nope.staging import copy_other_files, new_directory
from flare.nope.tensor_names import o_proj_biases, query_tensors, tensor_names
from flare.nope.weight_files import Change, check_weights, transfer_weights


def export_native(source: Path, target: Path) -> tuple[dict, Comparison]:
    """Write a patched model as SmolLM3 (Qwen2) or ExaoneMoe (Qwen3), checked to be bit-equal before it gets its name.

    All of Qwen's tensors keep their names there, so their files are linked; SmolLM3's o_proj biases, which Qwen2
    does not have, are a small file of zeros.

    Returns: the export's config.json, and what was compared.
    Raises: ConfigError for what cannot be represented, CheckpointError for damaged weights, both before anything
        is written; FlareError when the export does not compute the same bits.
    """
    config = read_model_config(source)
    native = to_native(config, str(source))
    family = family_of(config, str(source))
    check_weights(source, tensor_names(family, config))
    zeros = o_proj_biases(config["num_hidden_layers"]) if family == "qwen2" else []
    with new_directory(target, source) as temporary:
        # Servers want safetensors; a .bin file is rewritten even where no tensor changes.
        transfer_weights(source, temporary, Change(zeros=tuple(zeros)), to_safetensors=True)
        copy_other_files(source, temporary)
        copy_canary(source, temporary)  # the same weights, the same numbers
        write_config(native, temporary)
        compared = compare_with_export(source, temporary, nope_layers_of(native))
        (temporary / "README.md").write_text(export_card(native, compared, source), encoding="utf-8")
    return native, compared


def restore_rope(source: Path, target: Path) -> dict:
    """Write the plain Qwen model of a patched model or a native export: RoPE in every layer again.

    The weights are those of the NoPE model; a folded temperature is divided out (exactly for powers of two).

    Returns: the plain model's config.json.
    Raises: ConfigError for a model without NoPE layers of ours, CheckpointError for damaged or changed files.
    """
    config = read_model_config(source)
    exported = is_export(config)
    plain = from_native(config, str(source)) if exported else with_nope(config, [], None, str(source))
    layers = nope_layers_of(config)
    if not layers:
        raise ConfigError(f"{source} has no NoPE layers; there is nothing to restore")
    family = family_of(plain, str(source))
    check_weights(source, tensor_names(family, plain))
    beta = plain.pop("nope_temperature", None)
    change = Change(
        drop=frozenset(o_proj_biases(plain["num_hidden_layers"])) if exported and family == "qwen2" else frozenset(),
        scale={} if beta is None else dict.fromkeys(query_tensors(family, layers), 1 / beta),
    )
    with new_directory(target, source) as temporary:
        transfer_weights(source, temporary, change)
        copy_other_files(source, temporary)
        write_config(plain, temporary)
    return plain
