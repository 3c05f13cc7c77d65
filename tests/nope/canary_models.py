"""Small patched models whose layers react to positions."""

from pathlib import Path

from flare.nope.patch import patch_checkpoint
from tests.conftest import write_base

LAYERS = [1, 3]


SHARP = {"initializer_range": 0.1}
"""Attention that looks somewhere: with transformers' default range, random models hardly notice positions."""


def make_patched(directory: Path, family: str = "qwen2", **changes: object) -> Path:
    base = write_base(directory / f"{family}-base", family, **(SHARP | changes))
    patch_checkpoint(base, directory / family, LAYERS)
    return directory / family
