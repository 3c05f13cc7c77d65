"""Complete runs with ``--precision fp16``: overflows, stops and resumes."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from flare.nope.load import load_causal_lm
from tests.conftest import write_base
from tests.processes import train


@pytest.fixture(scope="session")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is so large that the first four steps overflow."""
    directory = write_base(tmp_path_factory.mktemp("fp16") / "base", tie_word_embeddings=False)
    model = load_causal_lm(directory)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    model.save_pretrained(directory)
    return directory


def state_of(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").read_text())["progress"]


def losses_of(run: Path) -> list[dict]:
    history = json.loads((run / "training_metrics.json").read_text())["stages"]["2"]["history"]
    return [record for record in history if "loss" in record]


@pytest.mark.slow
def test_a_run_that_stops_among_overflows_resumes_to_the_same_bits(
    train_flags: list[str], overflowing: Path, tmp_path: Path
) -> None:
    """Stopped after step 2, whose scale and count a fresh start would not have. On two processes the gradients of a
    row are twice as large before their mean is taken, as HF's are, so there more steps may overflow."""
    flags = [*train_flags, "--stage", 2, "--precision", "fp16", "--model_name_or_path", overflowing]
    flags += ["--lr_scheduler_type", "constant", "--global_batch_size", 2]
    out = tmp_path / "out"
    assert train(*flags, "--max_steps", 2).returncode == 0
    assert (state_of(out / "run", 2)["loss_scale"], state_of(out / "run", 2)["overflow_steps"]) == (2.0**14, 2)
    shutil.copytree(out / "run", out / "two")
    for name, *layout in (("run",), ("unbroken",), ("two", "--nproc_per_node", 2)):
        result = train(*flags, "--max_steps", 7, "--experiment_name", name, *layout)
        assert result.returncode == 0, result.stderr
    ends = [out / name / "checkpoints" / "checkpoint-7" for name in ("run", "unbroken")]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert ends[0].joinpath(file).read_bytes() == ends[1].joinpath(file).read_bytes()
    names = ("loss_scale", "good_steps", "overflow_steps")
    states = [[state_of(out / name, 7)[key] for key in names] for name in ("run", "unbroken")]
    assert states[0] == states[1] == [2.0**12, 3, 4]
    log = (out / "run" / "training.log").read_text()
    assert "loss scale 4096 from here on (4 such steps so far)" in log
    assert [r["overflow_steps"] for r in losses_of(out / "run")] == [1, 2, 3, 4, 4, 4, 4]
    third = losses_of(out / "two")[2]
    assert (third["overflow_steps"], third["loss_scale"]) == (3, 2.0**13)
    assert third["loss"] == pytest.approx(losses_of(out / "run")[2]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    "layout", [(), pytest.param(("--nproc_per_node", 2, "--parallel", "fsdp"), marks=pytest.mark.slow)]
)
def test_stage_one_runs_and_resumes_in_fp16(train_flags: list[str], tmp_path: Path, layout: tuple) -> None:
    for steps in (2, 4):
        result = train(*train_flags, "--precision", "fp16", "--max_steps", steps, *layout)
        assert result.returncode == 0, result.stderr
    assert "resumes from checkpoint-2" in result.stderr
    assert "precision fp16 (as requested)" in result.stderr
    refused = train(*train_flags, "--precision", "bf16", "--max_steps", 6, *layout)
    assert refused.returncode != 0
    assert "precision: fp16 -> bf16" in refused.stderr
