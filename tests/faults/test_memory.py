"""Too little memory, by a real limit of the process (row 50): the error names the phase, no file is incomplete."""

from pathlib import Path

import pytest

from tests.conftest import write_base
from tests.faults.harness import complete_steps, digest, stage
from tests.processes import Zygote

ROOM_MIB = 12
"""Memory that may still be allocated: enough for the stack of a thread, but less than each phase below needs."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 50 MB, so that a phase needs memory that its process has not had before."""
    return write_base(tmp_path_factory.mktemp("large") / "model", hidden_size=512, intermediate_size=2048)


@pytest.fixture
def large_flags(flags: list[str], large: Path) -> list[str]:
    return [
        *flags, "--model_name_or_path", str(large), "--max_steps", "4", "--max_seq_length", "128",
        "--per_device_train_batch_size", "8",
    ]  # fmt: skip


PHASES = {
    "loading the model": ("flare.train.session", "Session._build"),
    "training": ("flare.train.trainer", "Trainer._step"),
    "evaluating": ("flare.train.trainer", "Trainer._evaluate"),
}


@pytest.mark.parametrize(
    ("phase", "kept"),
    [
        ("training", [2]),
        pytest.param("loading the model", [2], marks=pytest.mark.faults),
        pytest.param("evaluating", [], marks=pytest.mark.faults),  # the untrained model: later ones need no more
    ],
)
def test_short_memory_names_the_phase_and_leaves_nothing_half(
    zygote: Zygote, large_flags: list[str], run: Path, phase: str, kept: list[int]
) -> None:
    if kept:
        assert zygote.run(*large_flags, "--max_steps", 2).returncode == 0
        (run / "final_model").rename(run / "final_model_of_2")
    ended = zygote.run(*large_flags, fault=("limit_memory", *PHASES[phase], ROOM_MIB))
    assert ended.returncode == 5, ended.stderr
    (error,) = ended.errors
    assert f"rank 0 (cpu (1 threads)) ran out of memory while {phase} (" in error
    assert (stage(run)["status"], f"error: {stage(run)['error']}") == ("failed", error)
    assert not (run / "final_model").exists()
    assert complete_steps(run) == kept
    again = zygote.run(*large_flags)
    assert again.returncode == 0, again.stderr
    assert complete_steps(run) == [2, 4]
    assert not list(run.rglob(".tmp-*"))
    assert digest(run / "final_model")
