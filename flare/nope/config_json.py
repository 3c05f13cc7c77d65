"""config.json of models with NoPE layers, and the modelling file that is saved with it.

Functions take and return plain dicts. Nothing here loads weights.
"""

import json
import shutil
from pathlib import Path

from flare.errors import CheckpointError, ConfigError

MODELING_FILE = Path(__file__).with_name("modeling_nope.py")
FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3"}
"""model_type of the stock family -> prefix of its class names."""
NATIVE_TYPES = {"qwen2": "smollm3", "qwen3": "exaone_moe"}
"""model_type of the stock family -> that of a native export: another architecture with the same arithmetic."""
EXPORTED = {native: family for family, native in NATIVE_TYPES.items()}


def family_of(config: dict, where: str) -> str:
    """Return ``qwen2`` or ``qwen3``.

    Raises: ConfigError for other model types, and for features that NoPE layers cannot be combined with.
    """
    model_type = str(config.get("model_type", "")).removesuffix("_nope")
    if model_type not in FAMILIES:
        hint = "; --restore_rope makes a Qwen model of this native export" if is_export(config) else ""
        raise ConfigError(
            f"{where} is a {config.get('model_type')!r} model; supported: qwen2 (Qwen2, Qwen2.5) and qwen3, "
            f"dense{hint}"
        )
    if config.get("use_sliding_window") or set(config.get("layer_types") or []) - {"full_attention"}:
        key = "use_sliding_window" if config.get("use_sliding_window") else "layer_types"
        raise ConfigError(f"{where} uses sliding-window attention ({key}), which is not supported")
    return model_type


def depth_of(config: dict, where: str) -> int:
    """Number of decoder layers. Raises: CheckpointError when config.json does not have it."""
    depth = config.get("num_hidden_layers")
    if not isinstance(depth, int) or depth < 1:
        raise CheckpointError(f"{where}: num_hidden_layers must be a whole number above 0, config.json has {depth!r}")
    return depth


def theta_of(config: dict, where: str) -> float:
    """RoPE base of a config.json of transformers 4 (``rope_theta``) or 5 (``rope_parameters``).

    Raises: CheckpointError when both exist and disagree: one of the two versions would silently use a wrong base.
    """
    new = (config.get("rope_parameters") or {}).get("rope_theta")
    old = config.get("rope_theta")
    if new is not None and old is not None and float(new) != float(old):
        raise CheckpointError(
            f"{where}: rope_theta {old} and rope_parameters.rope_theta {new} disagree; set both to the true one"
        )
    return float(new if new is not None else old if old is not None else 10000.0)


def rope_of(config: dict, where: str) -> dict:
    """RoPE of a config.json of transformers 4 or 5, as transformers 5 spells it: rope_type, rope_theta, scaling.

    Raises: CheckpointError when the two spellings disagree.
    """
    theta = theta_of(config, where)
    new, old = (_rope_type_named(config.get(key)) for key in ("rope_parameters", "rope_scaling"))
    if new and old and new | {"rope_theta": theta} != old | {"rope_theta": theta}:
        raise CheckpointError(f"{where}: rope_scaling and rope_parameters disagree; set both to the true one")
    return {"rope_type": "default"} | new | old | {"rope_theta": theta}


def _rope_type_named(parameters: dict | None) -> dict:
    """The same parameters with the key ``rope_type``, which older files call ``type``."""
    named = dict(parameters or {})
    if "type" in named:
        named.setdefault("rope_type", named.pop("type"))
        named.pop("type", None)
    return named


def with_rope(config: dict, rope: dict) -> dict:
    """The config.json with this RoPE in both spellings.

    If a file had only the spelling of version 5, transformers 4.57 would silently use another theta and no scaling.
    """
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    scaling = None if rope["rope_type"] == "default" else scaling
    return config | {"rope_parameters": rope, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def is_export(config: dict) -> bool:
    """Whether a config.json belongs to a native export: a stock architecture with our ``nope_layers``."""
    return config.get("model_type") in EXPORTED and "nope_layers" in config


def nope_layers_of(config: dict) -> list[int]:
    """NoPE layers in a config.json of ours or of a stock architecture that has some; [] for a plain model.

    Raises: CheckpointError when nope_layers is not a list of indices, when a model_type of ours has no NoPE layers, or
        when nope_layers of an export contradicts the field of its architecture.
    """
    recorded = config.get("nope_layers")
    if recorded is not None and not (isinstance(recorded, list) and all(type(i) is int for i in recorded)):
        raise CheckpointError(f"config.json: nope_layers must be a list of layer indices, got {recorded!r}; edited?")
    if not recorded and str(config.get("model_type", "")).endswith("_nope"):
        raise CheckpointError(
            f"config.json is that of a {config['model_type']} model, but nope_layers names no layer; edited?"
        )
    architecture = STOCK_NOPE_FIELDS.get(config.get("model_type"))
    if architecture is None:
        return sorted(recorded or [])
    field, read = architecture
    layers = read(config)
    if recorded is not None and sorted(recorded) != layers:
        raise CheckpointError(
            f"config.json contradicts itself: nope_layers says {sorted(recorded)}, {field} says {layers}; "
            "one of them was edited"
        )
    return layers


def declares_nope_layers(config: dict) -> bool:
    """Whether ``nope_layers_of`` can read from this config.json which layers are NoPE layers.

    It cannot for models without RoPE, such as GPT-2, and for other hybrids.
    """
    model_type = str(config.get("model_type", "")).removesuffix("_nope")
    return model_type in FAMILIES or model_type in STOCK_NOPE_FIELDS or "nope_layers" in config


def _smollm3_nope_layers(config: dict) -> list[int]:
    """SmolLM3's ``no_rope_layers`` has 1 for a layer that uses RoPE, 0 for one that does not."""
    period = config.get("no_rope_layer_interval", 4)
    flags = config.get("no_rope_layers") or [(i + 1) % period for i in range(config["num_hidden_layers"])]
    return [i for i, uses_rope in enumerate(flags) if not uses_rope]


def _exaone_moe_nope_layers(config: dict) -> list[int]:
    """ExaoneMoe uses RoPE only in sliding-window layers, or in all layers when no window is set."""
    if config.get("sliding_window", 1) is None:
        return []
    return [i for i, kind in enumerate(config.get("layer_types") or []) if kind == "full_attention"]


STOCK_NOPE_FIELDS = {
    "smollm3": ("no_rope_layers", _smollm3_nope_layers),
    "exaone_moe": ("layer_types", _exaone_moe_nope_layers),
}


def with_nope(config: dict, nope_layers: list[int], rope_theta: float | None, where: str) -> dict:
    """The config.json of the same model with these NoPE layers (a plain Qwen config when there are none)."""
    family = family_of(config, where)
    rope = rope_of(config, where)
    if rope_theta is not None:
        rope["rope_theta"] = float(rope_theta)
    new = with_rope({k: v for k, v in config.items() if k not in ("auto_map", "nope_layers")}, rope)
    name = FAMILIES[family]
    if not nope_layers:
        return new | {"model_type": family, "architectures": [f"{name}ForCausalLM"]}
    module = MODELING_FILE.stem
    return new | {
        "model_type": f"{family}_nope",
        "architectures": [f"{name}NopeForCausalLM"],
        "nope_layers": sorted(nope_layers),
        "auto_map": {
            "AutoConfig": f"{module}.{name}NopeConfig",
            "AutoModel": f"{module}.{name}NopeModel",
            "AutoModelForCausalLM": f"{module}.{name}NopeForCausalLM",
        },
    }


def reject_custom_code(config: dict, where: str) -> None:
    """Check that a model does not need custom code other than our modelling file.

    Raises: CheckpointError.
    """
    asked = config.get("auto_map") or {}
    ours = str(config.get("model_type", "")).endswith("_nope")
    if (not ours and asked) or not all(str(value).startswith(f"{MODELING_FILE.stem}.") for value in asked.values()):
        raise CheckpointError(f"{where} wants to run its own code (auto_map); that is not allowed")


def write_config(config: dict, directory: Path) -> None:
    """Write config.json, and next to it the modelling file when the model needs it."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    if "auto_map" in config:
        shutil.copyfile(MODELING_FILE, directory / MODELING_FILE.name)


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint: all files of its index, or the single file.

    Raises: CheckpointError when there are none or a shard is missing.
    """
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (directory / index).is_file():
            try:
                names = set(json.loads((directory / index).read_text(encoding="utf-8"))["weight_map"].values())
                files = [directory / name for name in sorted(names)]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(f"{directory / index} is not an index of weight files") from error
            if outside := [name for name in names if Path(name).name != name]:
                raise CheckpointError(f"{directory / index} names a file outside of the directory: {outside[0]}")
            for file in files:
                if not file.is_file():
                    raise CheckpointError(f"shard {file.name} is missing in {directory} ({index} names it)")
            return files
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return [directory / name]
    found = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
    raise CheckpointError(f"no weights (*.safetensors or pytorch_model*.bin) in {directory}; found: {found}")
