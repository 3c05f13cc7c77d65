"""The directory of token caches."""

from pathlib import Path

from flare.errors import ConfigError


def default_cache_dir(cache_dir: str | None) -> Path:
    """``--cache_dir``, or ~/.cache/flare."""
    return Path(cache_dir).expanduser() if cache_dir else Path.home() / ".cache" / "flare"


def make_cache_dir(cache_dir: Path) -> None:
    """Create the directory if it is missing. Raises: ConfigError if it cannot be created."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--cache_dir {cache_dir} cannot be created: {error.strerror}") from error
