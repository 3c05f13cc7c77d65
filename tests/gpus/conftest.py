"""Fixtures for GPU selection: a real subprocess runs a fake nvidia-smi that is first on PATH."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flare.gpus.nvidia_smi import query_gpus
from flare.gpus.selection import (
    GpuRequest,
    Selection,
    select_gpus,
)
from tests.fake_nvidia_smi import FakeNvidiaSmi, install


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FakeNvidiaSmi]:
    """Makes this process see the fake of that mode."""

    def use(mode: str) -> FakeNvidiaSmi:
        fake = install(tmp_path / "bin", mode)
        monkeypatch.setenv("PATH", str(fake.directory) + os.pathsep + os.environ["PATH"])
        return fake

    return use


@pytest.fixture
def choose(server) -> Callable[..., Selection]:
    """Query the fake and choose: choose("guide", gpu_type="A40", visible="0,1")."""

    def run(mode: str, visible: str | None = None, **request) -> Selection:
        server(mode)
        return select_gpus(GpuRequest(**request), query_gpus(visible=visible), visible)

    return run
