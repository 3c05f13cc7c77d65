"""A NoPE model for runtimes without our code, and back to plain Qwen: directories in, whole directories out."""

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
    """Write a patched model as SmolLM3 (Qwen2) or ExaoneMoe (Qwen3), proven bit-equal before it gets its name.

    All of Qwen's tensors keep their names there, so their files are linked; SmolLM3's o_proj biases, which Qwen2
    has not, are a small file of zeros.

    Returns: the export's config.json, and what was compared.
    Raises: ConfigError for what cannot be represented, CheckpointError for damaged weights, both before anything
        is written; FlareError when the export does not give the same bits.
    """
    config = read_model_config(source)
    native = to_native(config, str(source))
    family = family_of(config, str(source))
    check_weights(source, tensor_names(family, config))
    zeros = o_proj_biases(config["num_hidden_layers"]) if family == "qwen2" else []
    with new_directory(target, source) as part:
        # Servers want safetensors; a .bin file is rewritten even where no tensor changes.
        transfer_weights(source, part, Change(zeros=tuple(zeros)), to_safetensors=True)
        copy_other_files(source, part)
        copy_canary(source, part)  # the same weights, the same numbers
        write_config(native, part)
        compared = compare_with_export(source, part, nope_layers_of(native))
        (part / "README.md").write_text(export_card(native, compared, source), encoding="utf-8")
    return native, compared


def restore_rope(source: Path, target: Path) -> dict:
    """Write the plain Qwen model of a patched model or a native export: RoPE in every layer again.

    The weights are those of the NoPE model; a folded temperature is taken out of them (exactly for powers of two).

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
    with new_directory(target, source) as part:
        transfer_weights(source, part, change)
        copy_other_files(source, part)
        write_config(plain, part)
    return plain
