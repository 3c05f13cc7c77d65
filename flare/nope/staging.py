"""Writes model directories atomically: in a temporary directory next to the target, renamed when complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flare.errors import ConfigError, EnvError

NOT_COPIED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.index.json",  # weights
    "config.json",  # written again
    "*.py", "README.md", "nope_canary.json",  # of the other model
    "trainer_state.json", "manifest.json", ".*",  # of a training run
)  # fmt: skip
"""Files that are not copied from a model directory to one that is made from it. The tokenizer, licences and
generation_config.json are copied."""


@contextlib.contextmanager
def new_directory(target: Path, source: Path) -> Iterator[Path]:
    """Yield a directory to fill. It is renamed to ``target`` after the block, or removed when the block fails.

    Raises: ConfigError when ``target`` is in ``source`` or is not empty; EnvError when it cannot be written.
    """
    inside = source.resolve() in (target.resolve(), *target.resolve().parents)
    if inside:
        raise ConfigError(f"--output_dir {target} is in the model's own directory {source}; name another")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--output_dir {target} is not empty; name a new directory, or remove it first")
    temporary = target.absolute().with_name(f".{target.absolute().name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
    except OSError as error:
        raise EnvError(f"cannot write --output_dir {target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_other_files(source: Path, temporary: Path) -> None:
    """Copy the files that belong to the weights: tokenizer, generation_config.json, licences."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(file, temporary / file.name)
