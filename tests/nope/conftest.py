"""Fixtures of the tests of modeling_nope.py."""

import random

import pytest
from transformers import PreTrainedModel

from flare.nope.patch import patch_checkpoint
from tests.conftest import write_base
from tests.nope.patched_models import DEPTH, SHAPES, Patched


@pytest.fixture(scope="module", params=SHAPES)
def patched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Patched:
    """A random model that looks at positions, with a random set of NoPE layers."""
    family, shape = SHAPES[request.param]
    root = tmp_path_factory.mktemp("attention")
    write_base(root / "base", family, initializer_range=0.1, **shape)
    draw = random.Random(request.param)
    layers = sorted(draw.sample(range(DEPTH), draw.randint(1, DEPTH - 1)))
    patch_checkpoint(root / "base", root / "patched", layers)
    return Patched(root / "patched", layers)


@pytest.fixture
def model(patched: Patched) -> PreTrainedModel:
    return patched.load()
