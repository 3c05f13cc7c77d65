"""The checkpoint format of models with NoPE layers: config.json, and the modelling file that travels along.

Plain dict in, plain dict out; nothing here loads weights.
"""

import json
import shutil
from pathlib import Path

from flare.errors import CheckpointError, ConfigError

MODELING_FILE = Path(__file__).with_name("modeling_nope.py")
FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3"}
"""model_type of the stock family -> prefix of its class names."""


def family_of(config: dict, where: str) -> str:
    """``qwen2`` or ``qwen3``.

    Raises: ConfigError for every other model_type, and for what NoPE layers cannot be combined with.
    """
    model_type = str(config.get("model_type", "")).removesuffix("_nope")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{where} is a {config.get('model_type')!r} model; supported: qwen2 (Qwen2, Qwen2.5) and qwen3, dense"
        )
    if config.get("use_sliding_window"):
        raise ConfigError(f"{where} uses sliding-window attention (use_sliding_window), which is not supported")
    return model_type


def theta_of(config: dict, where: str) -> float:
    """RoPE base of a config.json of transformers 4 (``rope_theta``) or 5 (``rope_parameters``).

    Raises: CheckpointError when both are there and disagree: one of the two versions would be silently wrong.
    """
    new = (config.get("rope_parameters") or {}).get("rope_theta")
    old = config.get("rope_theta")
    if new is not None and old is not None and float(new) != float(old):
        raise CheckpointError(
            f"{where}: rope_theta {old} and rope_parameters.rope_theta {new} disagree; set both to the true one"
        )
    return float(new if new is not None else old if old is not None else 10000.0)


def nope_layers_of(config: dict) -> list[int]:
    """NoPE layers that a config.json names; none for a plain model."""
    return sorted(config.get("nope_layers") or [])


def with_nope(config: dict, nope_layers: list[int], rope_theta: float | None, where: str) -> dict:
    """The config.json of the same model with these NoPE layers (a plain Qwen config when there are none)."""
    family = family_of(config, where)
    theta = rope_theta if rope_theta is not None else theta_of(config, where)
    new = {k: v for k, v in config.items() if k not in ("auto_map", "nope_layers")}
    # Both spellings: transformers 4.57 reading a v5 config.json would silently take another theta.
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {"rope_type": "default"})
    new["rope_parameters"] = parameters | {"rope_theta": theta}
    new["rope_theta"] = theta
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


def write_config(config: dict, directory: Path) -> None:
    """Write config.json, and the modelling file beside it when the model has NoPE layers."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    if nope_layers_of(config):
        shutil.copyfile(MODELING_FILE, directory / MODELING_FILE.name)


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint, all that its index names.

    Raises: CheckpointError when there are none or a shard is missing.
    """
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (directory / index).is_file():
            try:
                names = set(json.loads((directory / index).read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{directory / index} is no index of weight files") from error
            files = [directory / name for name in sorted(names)]
            for file in files:
                if not file.is_file():
                    raise CheckpointError(f"shard {file.name} is missing in {directory} ({index} names it)")
            return files
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return [directory / name]
    found = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
    raise CheckpointError(f"no weights (*.safetensors or pytorch_model*.bin) in {directory}; found: {found}")
