"""Take RoPE out of chosen layers: of a loaded model, or of a checkpoint on disk without loading it."""

import math
from pathlib import Path

from transformers import PreTrainedModel

from flare.errors import ConfigError
from flare.hub import read_model_config
from flare.nope import modeling_nope
from flare.nope.config_json import FAMILIES, depth_of, family_of, nope_layers_of, with_nope, write_config
from flare.nope.layers import format_layers, parse_layers
from flare.nope.probe import verify_nope
from flare.nope.staging import copy_other_files, new_directory
from flare.nope.temperature import check_temperature, fold_temperature
from flare.nope.tensor_names import query_tensors, tensor_names
from flare.nope.weight_files import Change, check_weights, transfer_weights

NOPE_CAUSAL_LM = {
    modeling_nope.Qwen2ForCausalLM: modeling_nope.Qwen2NopeForCausalLM,
    modeling_nope.Qwen3ForCausalLM: modeling_nope.Qwen3NopeForCausalLM,
}


def patch_qwen_rope(
    model: PreTrainedModel,
    no_rope_layers: str | int | list,
    rope_theta: float | None = None,
    nope_temperature: float | None = None,
) -> PreTrainedModel:
    """Make layers of a loaded Qwen2 or Qwen3 causal LM NoPE layers, in place; that instance only.

    Args:
        no_rope_layers: indices or a spec like "20-32", "every:4", "auto".
        rope_theta: new RoPE base for the layers that keep RoPE.
        nope_temperature: factor on the attention scores of the NoPE layers, folded into their weights.
    Returns: the same object; ``model.config`` says what it is now, ``save_pretrained`` keeps it.
    Raises: ConfigError for layers that the model has not, another family, or a model that is patched already.
    """
    config = model.config.to_dict()
    layers = _layers_to_patch(config, no_rope_layers, "the model")
    family = family_of(config, "the model")
    patched = _patched_config(config, layers, rope_theta, nope_temperature, "the model")
    implementation = model.config._attn_implementation
    config_class = getattr(modeling_nope, f"{FAMILIES[family]}NopeConfig")
    model.config = config_class.from_dict(patched)
    model.config._attn_implementation = implementation
    decoder = model.get_decoder()
    decoder.config = model.config
    for layer in decoder.layers:
        layer.self_attn.config = model.config
    modeling_nope.remove_rope(decoder, layers)
    model.__class__ = NOPE_CAUSAL_LM.get(type(model), type(model))  # whose save_pretrained takes the code along
    if rope_theta is not None:
        decoder.rotary_emb = type(decoder.rotary_emb)(model.config).to(model.device)
    if nope_temperature is not None:
        fold_temperature(model, family, layers, nope_temperature)
    verify_nope(model)
    return model


def patch_checkpoint(
    source: Path,
    target: Path,
    no_rope_layers: str | int | list,
    rope_theta: float | None = None,
    nope_temperature: float | None = None,
) -> list[int]:
    """Write a patched copy of a checkpoint. Weights are hard links, or copies across file systems.

    With a temperature the shards that hold queries of NoPE layers are rewritten, the others linked.

    Returns: the NoPE layers.
    Raises: ConfigError / CheckpointError before anything is written.
    """
    config = read_model_config(source)
    layers = _layers_to_patch(config, no_rope_layers, str(source))
    family = family_of(config, str(source))
    patched = _patched_config(config, layers, rope_theta, nope_temperature, str(source))
    patched.pop("flare", None)  # the base's training record, if any, is not the patched model's
    check_weights(source, tensor_names(family, config))
    scale = {} if nope_temperature is None else dict.fromkeys(query_tensors(family, layers), nope_temperature)
    with new_directory(target, source) as part:
        transfer_weights(source, part, Change(scale=scale))
        copy_other_files(source, part)
        write_config(patched, part)
    return layers


def _layers_to_patch(config: dict, no_rope_layers: str | int | list, where: str) -> list[int]:
    """The NoPE layers that a plain model is to have. Raises: ConfigError."""
    family_of(config, where)
    if nope_layers_of(config):
        raise ConfigError(
            f"{where} has NoPE layers already: {format_layers(nope_layers_of(config))}; patch the plain model "
            "(--restore_rope makes one)"
        )
    if "nope_temperature" in config:
        raise ConfigError(f"{where} has a nope_temperature but no NoPE layers: its config.json was edited")
    layers = parse_layers(no_rope_layers, depth_of(config, where))
    if not layers:
        raise ConfigError("--no_rope_layers none patches no layer")
    return layers


def _patched_config(
    config: dict, layers: list[int], rope_theta: float | None, nope_temperature: float | None, where: str
) -> dict:
    if rope_theta is not None and not 0 < rope_theta < math.inf:
        raise ConfigError(f"--rope_theta {rope_theta:g} must be a number above 0")
    patched = with_nope(config, layers, rope_theta, where)
    if nope_temperature is None:
        return patched
    return patched | {"nope_temperature": check_temperature(nope_temperature)}
