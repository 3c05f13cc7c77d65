"""Fixtures of the tests of launching."""

import os

import pytest


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove variables that other tests or a surrounding run have set, and those of this test after it."""
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith(("FLARE_", "MASTER_", "NNODES", "NODE_RANK", "GLOO_"))]:
        del os.environ[name]
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)
