"""Fixtures of the fault matrix: the process that forks runs, and the uninterrupted run."""

from pathlib import Path

import pytest

from tests import processes
from tests.faults.harness import ROWS, SAVE_EVERY, STEPS
from tests.processes import Zygote


@pytest.fixture(scope="session")
def zygote() -> Zygote:
    return processes.zygote()


def run_flags(base: Path, corpus: Path, cache_dir: Path, out: Path) -> list[str]:
    return [
        "--gpu_type", "cpu", "--model_name_or_path", str(base), "--dataset_name", str(corpus),
        "--cache_dir", str(cache_dir), "--base_output_dir", str(out), "--experiment_name", "run",
        "--max_seq_length", "32", "--per_device_train_batch_size", str(ROWS), "--max_steps", str(STEPS),
        "--save_steps", str(SAVE_EVERY), "--eval_steps", "4", "--logging_steps", "1",
        "--validation_split_percentage", "10", "--learning_rate", "1e-3", "--gradient_checkpointing", "false",
        "--no_rope_layers", "1", "3",
    ]  # fmt: skip


@pytest.fixture
def flags(base: Path, corpus: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    """A run of STEPS steps that takes about a second."""
    return run_flags(base, corpus, cache_dir, tmp_path / "out")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Its experiment directory."""
    return tmp_path / "out" / "run"


@pytest.fixture(scope="session")
def uninterrupted(
    zygote: Zygote, base: Path, corpus: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same run, uninterrupted; its rows are recorded next to it."""
    out = tmp_path_factory.mktemp("uninterrupted")
    ended = zygote.run(*run_flags(base, corpus, cache_dir, out), fault=("record_rows", str(out / "rows.jsonl")))
    assert ended.returncode == 0, ended.stderr
    return out / "run"
