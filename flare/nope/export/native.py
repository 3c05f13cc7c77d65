"""A NoPE model as an architecture that stock runtimes know, as config.json: Qwen2 is SmolLM3, Qwen3 ExaoneMoe.

Both do Qwen's arithmetic, operation by operation, and both have layers without RoPE; what differs is how
config.json says so. Plain dict in, plain dict out; export.py writes the weights, bit_equality.py compares the
logits.
"""

from typing import TYPE_CHECKING

from flare.errors import CheckpointError, ConfigError
from flare.nope.config_json import (
    EXPORTED,
    NATIVE_TYPES,
    depth_of,
    family_of,
    is_export,
    nope_layers_of,
    rope_of,
    with_rope,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ARCHITECTURES = {"smollm3": "SmolLM3ForCausalLM", "exaone_moe": "ExaoneMoeForCausalLM"}
COPIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "tie_word_embeddings", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
"""Keys that all four architectures have, with other defaults. An id that Qwen does not have is written as null: the
defaults of SmolLM3 and ExaoneMoe are valid ids of Qwen's vocabulary."""
RECORDS = ("dtype", "nope_temperature", "flare")
"""Our records about the weights."""
STATIC_ROPE = ("default", "linear", "yarn", "llama3")
"""RoPE whose frequencies do not depend on the length of the text."""
NO_WINDOW = 2**24
"""Sliding window, in tokens, of ExaoneMoe's RoPE layers: longer than any text. One of just
``max_position_embeddings`` would cut contexts that somebody extends, and let kernels build a mask at full length."""


def to_native(config: dict, where: str) -> dict:
    """The config.json of a patched model as SmolLM3 or ExaoneMoe.

    Raises: ConfigError for what that architecture cannot represent, by name.
    """
    if is_export(config):
        raise ConfigError(f"{where} is a native export already ({config['model_type']})")
    family = family_of(config, where)
    layers = nope_layers_of(config)
    if not layers:
        raise ConfigError(f"{where} has no NoPE layers; stock runtimes open a plain {family} model as it is")
    rope = rope_of(config, where)
    _check_representable(config, rope, where)
    if family == "qwen3" and config.get("attention_bias"):
        raise ConfigError(f"{where} has biases on its projections (attention_bias); ExaoneMoe has none")
    stock = _with_defaults(config, family)
    native = {key: getattr(stock, key) for key in COPIED}
    native |= {key: config[key] for key in RECORDS if key in config}
    if "torch_dtype" in config:
        native.setdefault("dtype", config["torch_dtype"])
    if getattr(stock, "head_dim", None) is not None:
        native["head_dim"] = stock.head_dim
    model_type = NATIVE_TYPES[family]
    native |= {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "nope_layers": layers,  # our own record: runtimes ignore it, --verify compares
    }
    return with_rope(native | SPECIFIC[family](native, layers, where), rope)


def _with_defaults(config: dict, family: str) -> "PretrainedConfig":
    """The configuration object of stock Qwen, which fills in Qwen's own defaults."""
    from transformers import Qwen2Config, Qwen3Config  # here: --inspect needs no transformers

    return {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[family].from_dict(config)


def _check_representable(config: dict, rope: dict, where: str) -> None:
    if rope["rope_type"] not in STATIC_ROPE:
        raise ConfigError(
            f"{where} uses RoPE scaling {rope['rope_type']!r}, whose frequencies follow the length of the text, "
            f"each runtime in its own way; exports have {', '.join(STATIC_ROPE)}"
        )
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ConfigError(f"{where} has a partial_rotary_factor, which Qwen ignores and other architectures do not")
    if config.get("quantization_config"):
        raise ConfigError(f"{where} is quantised (quantization_config); export the model before quantisation")


def _smollm3(config: dict, layers: list[int], where: str) -> dict:
    depth = depth_of(config, where)
    return {
        "attention_bias": True,  # on q, k, v as Qwen2; creates one on o_proj, too, which is written as zeros
        "mlp_bias": False,
        "no_rope_layers": [int(i not in layers) for i in range(depth)],  # 1: the layer uses RoPE
        "layer_types": ["full_attention"] * depth,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _exaone_moe(config: dict, layers: list[int], where: str) -> dict:
    depth = depth_of(config, where)
    if len(layers) == depth:
        raise ConfigError(
            f"all {depth} layers of {where} are NoPE layers; ExaoneMoe cannot express this: vLLM and SGLang turn "
            "RoPE on everywhere when no layer is a sliding one"
        )
    window = max(NO_WINDOW, config["max_position_embeddings"])
    return {
        "layer_types": ["full_attention" if i in layers else "sliding_attention" for i in range(depth)],
        "sliding_window": window,
        "sliding_window_pattern": None,
        "sliding_windows": [0 if i in layers else window for i in range(depth)],  # newer vLLM and SGLang
        "mlp_layer_types": ["dense"] * depth,
        "first_k_dense_replace": depth,
        "is_moe_layer": [False] * depth,  # SGLang, older vLLM
    }


SPECIFIC = {"qwen2": _smollm3, "qwen3": _exaone_moe}


def from_native(config: dict, where: str) -> dict:
    """The config.json of the plain Qwen model that an export was made of, RoPE in every layer.

    Raises: CheckpointError when the export is not what ``to_native`` writes.
    """
    check_native(config, where)
    family = EXPORTED[config["model_type"]]
    plain = {key: config[key] for key in (*COPIED, "head_dim", *RECORDS) if key in config}
    plain |= {"model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"]}
    return with_rope(plain, rope_of(config, where))


def check_native(config: dict, where: str) -> None:
    """Check all fields of an export's config.json that ``to_native`` sets.

    Raises: CheckpointError naming the first field that is not what ``to_native`` writes.
    """
    rope_of(config, where)
    family = EXPORTED[config["model_type"]]
    recipe = SPECIFIC[family](config, nope_layers_of(config), where)
    for key, value in recipe.items():
        if config.get(key) != value:
            raise CheckpointError(f"{where}: {key} is {config.get(key)!r} where the export has {value!r}; edited?")
