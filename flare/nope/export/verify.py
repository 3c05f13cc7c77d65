"""What a model directory says it is (``model_facts``), and the proof that it is that (``verify_directory``)."""

import json
from pathlib import Path

from flare.hub import read_model_config
from flare.nope.canary.file import CANARY_FILE
from flare.nope.config_json import EXPORTED, depth_of, family_of, is_export, nope_layers_of, theta_of
from flare.nope.export.native import check_native
from flare.nope.layers import format_layers


def model_facts(directory: Path) -> dict[str, str]:
    """Family, layers, NoPE layers, theta, trained tokens, ... of a plain, patched or exported model, as words.

    Reads config.json only. Raises: ConfigError for another family, CheckpointError for a config.json that
    contradicts itself.
    """
    config = read_model_config(directory)
    where = str(directory)
    if is_export(config):
        check_native(config, where)
    facts = {
        "family": EXPORTED[config["model_type"]] if is_export(config) else family_of(config, where),
        "model_type": config["model_type"],
        "layers": depth_of(config, where),
        "NoPE layers": format_layers(nope_layers_of(config)),
        "rope_theta": f"{theta_of(config, where):g}",
    }
    if "nope_temperature" in config:
        facts["nope_temperature"] = f"{config['nope_temperature']:g}"
    facts |= {name.replace("_", " "): value for name, value in (config.get("flare") or {}).items()}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def verify_directory(directory: Path) -> list[str]:
    """Load a model of ours, a native export or a plain Qwen, and hold it to its config.json.

    Returns: what was found, a line each.
    Raises: CheckpointError for weights that do not fit, layers that are not what config.json says, or a model that is
        not the one of its canary.
    """
    from flare.nope.canary.measure import check_against_canary  # here, not above: --inspect needs no torch
    from flare.nope.load import load_causal_lm

    layers = model_facts(directory)["NoPE layers"]
    model = load_causal_lm(directory)  # runs the probe
    lines = [f"NoPE layers found: {layers}, as config.json says (structural probe)"]
    verdict = check_against_canary(model, directory)
    return [*lines, f"{CANARY_FILE}: {verdict}"] if verdict else lines
