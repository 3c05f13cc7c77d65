"""Where token caches are kept."""

from pathlib import Path

from flare.errors import ConfigError


def default_cache_dir(cache_dir: str | None) -> Path:
    """Where token caches live: ``--cache_dir``, or ~/.cache/flare."""
    return Path(cache_dir).expanduser() if cache_dir else Path.home() / ".cache" / "flare"


def make_cache_dir(cache_dir: Path) -> None:
    """Make it where it is missing. Raises: ConfigError where it cannot be."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--cache_dir {cache_dir} cannot be made: {error.strerror}") from error
