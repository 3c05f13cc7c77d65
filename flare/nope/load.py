"""Open a causal LM and prove that it is what its files say. No silent repairs.

``from_pretrained`` fills missing tensors with random numbers and only warns, and opens a config that lies;
here both are errors.
"""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from flare.errors import CheckpointError, is_out_of_memory
from flare.hub import read_model_config
from flare.nope import modeling_nope
from flare.nope.config_json import (
    FAMILIES,
    declares_nope_layers,
    is_export,
    nope_layers_of,
    reject_custom_code,
    weight_files,
)
from flare.nope.probe import verify_nope

OWN_TYPES = {f"{family}_nope": name for family, name in FAMILIES.items()}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading bars and reports; what matters in them we check ourselves."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def load_causal_lm(
    directory: Path,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    config_dict: dict | None = None,
    device_map: str | dict | None = None,
) -> PreTrainedModel:
    """A causal LM of ours or of transformers, in evaluation mode on the CPU; its NoPE layers are proven where its
    config.json says which they are.

    Args:
        directory: a local model directory.
        dtype: of the weights; "auto" is the checkpoint's own.
        config_dict: use this config.json instead of the directory's (same shapes; NoPE layers or theta differ).
        device_map: accelerate's: "auto" spreads the layers over all GPUs, then the CPU's memory.

    Raises: CheckpointError for missing or misfitting tensors, foreign code (``auto_map``), or layers that
        are not what the configuration says.
    """
    raw = config_dict or read_model_config(directory)
    weight_files(directory)
    config, architecture = _architecture(raw, directory)
    placed = {"attn_implementation": attn_implementation, "device_map": device_map}
    extra = {name: value for name, value in placed.items() if value is not None}
    model = _load_weights(architecture, directory, config, dtype, extra)
    if declares_nope_layers(raw):
        verify_nope(model, nope_layers_of(raw), str(directory))
    return model.eval()


def empty_causal_lm(directory: Path, raw: dict, attn_implementation: str) -> PreTrainedModel:
    """The model of this config.json on the meta device, without weights: for those who fill it part by part.

    Its layers are not proven yet. Raises: CheckpointError for foreign code.
    """
    config, architecture = _architecture(raw, directory)
    build = architecture.from_config if architecture is AutoModelForCausalLM else architecture._from_config
    with quiet_transformers(), torch.device("meta"):
        return build(config, attn_implementation=attn_implementation).eval()


def _architecture(raw: dict, directory: Path) -> tuple[PreTrainedConfig, type]:
    """Configuration and class of a config.json; ``directory`` is for the message.

    Raises: CheckpointError when it asks for foreign code.
    """
    reject_custom_code(raw, str(directory))
    model_type = raw.get("model_type", "")
    if model_type in OWN_TYPES:
        name = OWN_TYPES[model_type]
        config = getattr(modeling_nope, f"{name}NopeConfig").from_dict(raw)
        return config, getattr(modeling_nope, f"{name}NopeForCausalLM")
    with quiet_transformers():
        return AutoConfig.for_model(**raw), AutoModelForCausalLM


def _load_weights(
    architecture: type, directory: Path, config: object, dtype: torch.dtype | str, extra: dict
) -> PreTrainedModel:
    try:
        with quiet_transformers():
            model, info = architecture.from_pretrained(
                directory, config=config, dtype=dtype, output_loading_info=True, local_files_only=True, **extra
            )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{directory} has a .bin file that holds more than plain tensors, which could run code: it is not opened"
        ) from error
    except (ValueError, OSError, RuntimeError, EOFError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{directory} cannot be loaded: {reason}") from error
    problems = []
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(n) for n in info.get(kind) or [])
        if names:
            words = kind.removesuffix("_keys")
            problems.append(f"{len(names)} {words} tensors (first: {names[0]})")
    if problems:
        raise CheckpointError(f"the weights in {directory} do not fit its config.json: {', '.join(problems)}")
    return model


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Of Qwen models, tokenizer.json decides: AutoTokenizer picks a class by model_type, and so cut the same text
    into other tokens for a model (qwen2) and for its patched copy (qwen2_nope); it also asks to run the
    modelling file of ours.

    Raises: CheckpointError when there is none.
    """
    config = read_model_config(directory)
    is_qwen = str(config.get("model_type", "")).removesuffix("_nope") in FAMILIES or is_export(config)
    own_file = is_qwen and (directory / "tokenizer.json").is_file()
    if is_qwen and not own_file and not (directory / "vocab.json").is_file():
        # transformers would make up an empty tokenizer, and the data would be end-of-text tokens only.
        raise CheckpointError(f"{directory} has no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    loader = PreTrainedTokenizerFast if own_file else AutoTokenizer
    try:
        with quiet_transformers():
            return loader.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no tokenizer can be loaded from {directory}: {error}") from error
