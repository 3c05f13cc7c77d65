"""A model directory that is whole or absent: built beside its place, renamed when everything in it is there."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flare.errors import ConfigError, EnvError

NOT_COPIED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.index.json",  # weights
    "config.json",  # written anew
    "*.py", "README.md", "nope_canary.json",  # of the other model
    "trainer_state.json", "manifest.json", ".*",  # of a training run
)  # fmt: skip
"""Files of a model directory that do not go along when another is made of it. The tokenizer's, licences and
generation_config.json do."""


@contextlib.contextmanager
def new_directory(target: Path, source: Path) -> Iterator[Path]:
    """A directory to fill, which becomes ``target`` at the end of the block, or vanishes when the block fails.

    Raises: ConfigError when ``target`` lies in ``source`` or is not empty; EnvError when it cannot be written.
    """
    inside = source.resolve() in (target.resolve(), *target.resolve().parents)
    if inside:
        raise ConfigError(f"--output_dir {target} lies in the model's own directory {source}; name another")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--output_dir {target} is not empty; name a new directory, or remove it first")
    part = target.absolute().with_name(f".{target.absolute().name}.tmp")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if target.exists():
            target.rmdir()
        os.rename(part, target)
    except OSError as error:
        raise EnvError(f"cannot write --output_dir {target}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def copy_other_files(source: Path, part: Path) -> None:
    """Copy what goes along with the weights: the tokenizer, generation_config.json, licences."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(file, part / file.name)
