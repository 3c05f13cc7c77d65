"""``patch_qwen_rope.py --refresh``: the current modelling file for a model that an older Flare wrote. No torch."""

from pathlib import Path

from flare.errors import ConfigError
from flare.files import write_text
from flare.hub import read_model_config
from flare.nope.config_json import MODELING_FILE


def refresh_modeling_file(directory: Path) -> bool:
    """Replace ``modeling_nope.py`` of a patched or trained model by this Flare's. Weights and config.json stay.

    Returns: whether the file changed.
    Raises: ConfigError for a model that does not use the file, and for a checkpoint, whose manifest holds its hash.
    """
    auto_map = read_model_config(directory).get("auto_map") or {}
    if not any(str(name).startswith(f"{MODELING_FILE.stem}.") for name in auto_map.values()):
        raise ConfigError(f"--refresh {directory}: config.json does not use {MODELING_FILE.name}; nothing to refresh")
    if (directory / "manifest.json").is_file():
        raise ConfigError(
            f"--refresh {directory}: this is a checkpoint, and its manifest holds the hash of {MODELING_FILE.name}; "
            "resume it with this Flare, or give a final_model"
        )
    target, text = directory / MODELING_FILE.name, MODELING_FILE.read_text(encoding="utf-8")
    if target.is_file() and target.read_text(encoding="utf-8", errors="replace") == text:
        return False
    write_text(target, text)
    return True
