"""Take RoPE out of chosen layers: of a loaded model, or of a checkpoint on disk without loading it."""

import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from flare.errors import CheckpointError, ConfigError
from flare.hub import read_model_config
from flare.nope import modeling_nope
from flare.nope.format import (
    FAMILIES,
    family_of,
    nope_layers_of,
    weight_files,
    with_nope,
    write_config,
)
from flare.nope.layers import format_layers, parse_layers
from flare.nope.probe import verify_nope


def patch_qwen_rope(
    model: PreTrainedModel, no_rope_layers: str | int | list, rope_theta: float | None = None
) -> PreTrainedModel:
    """Make layers of a loaded Qwen2 or Qwen3 causal LM NoPE layers, in place; that instance only.

    Args:
        no_rope_layers: indices or a spec like "20-32", "every:4", "auto".
        rope_theta: new RoPE base for the layers that keep RoPE.
    Returns: the same object; ``model.config`` says what it is now, ``save_pretrained`` keeps it.
    Raises: ConfigError for layers that the model has not, another family, or a model that is patched already.
    """
    config = model.config.to_dict()
    family = family_of(config, "the model")
    if nope_layers_of(config):
        raise ConfigError(f"the model has NoPE layers already: {format_layers(nope_layers_of(config))}")
    layers = parse_layers(no_rope_layers, model.config.num_hidden_layers)
    if not layers:
        raise ConfigError("--no_rope_layers none patches no layer")
    patched = with_nope(config, layers, rope_theta, "the model")
    implementation = model.config._attn_implementation
    config_class = getattr(modeling_nope, f"{FAMILIES[family]}NopeConfig")
    model.config = config_class.from_dict(patched)
    model.config._attn_implementation = implementation
    decoder = model.get_decoder()
    decoder.config = model.config
    for layer in decoder.layers:
        layer.self_attn.config = model.config
    modeling_nope.remove_rope(decoder, layers)
    if rope_theta is not None:
        decoder.rotary_emb = type(decoder.rotary_emb)(model.config).to(model.device)
    verify_nope(model)
    return model


def patch_checkpoint(
    source: Path, target: Path, no_rope_layers: str | int | list, rope_theta: float | None = None
) -> list[int]:
    """Write a patched copy of a checkpoint. Weights are hard links, or copies across file systems.

    Returns: the NoPE layers.
    Raises: ConfigError / CheckpointError before anything is written.
    """
    config = read_model_config(source)
    family_of(config, str(source))
    if nope_layers_of(config):
        raise ConfigError(
            f"{source} has NoPE layers already ({format_layers(nope_layers_of(config))}); patch the plain model"
        )
    layers = parse_layers(no_rope_layers, int(config["num_hidden_layers"]))
    if not layers:
        raise ConfigError("--no_rope_layers none patches no layer")
    weights = {file.name for file in weight_files(source)}
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"--output_dir {target} is not empty")
    part = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for file in sorted(source.iterdir()):
            if file.name in weights:
                link_or_copy(file, part / file.name)
            elif file.is_file() and not file.name.startswith(".") and file.name != "config.json":
                shutil.copyfile(file, part / file.name)
        patched = with_nope(config, layers, rope_theta, str(source))
        patched.pop("flare", None)  # the base's training record, if any, is not the patched model's
        write_config(patched, part)
        if target.exists():
            target.rmdir()
        os.rename(part, target)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(f"cannot write {target}: {error}") from error
    return layers


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link to the real file (hub snapshots are symbolic links), or a copy where links cannot go."""
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
