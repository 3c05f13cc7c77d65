"""Sharded runs of two processes that are killed (row 37): saves are complete, and the runs resume on any ranks."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flare.nope.load import load_causal_lm
from tests.conftest import write_base
from tests.faults.harness import STEPS, complete_steps, digest, stage
from tests.processes import Zygote

SHARDED = ("--nproc_per_node", 2, "--parallel", "fsdp", "--per_device_train_batch_size", 1, "--global_batch_size", 2)
WHOLE = ("--parallel", "ddp", "--per_device_train_batch_size", 1, "--global_batch_size", 2)


@pytest.fixture(params=[True, False], ids=["tied", "untied"], scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("model") / "base", tie_word_embeddings=request.param)


@pytest.fixture
def stage2(flags: list[str], model: Path) -> list[str]:
    """Everything trains, the embedding and the head, too."""
    return [*flags, "--stage", "2", "--model_name_or_path", str(model), "--lr_scheduler_type", "constant"]


@pytest.mark.faults
def test_a_killed_sharded_run_resumes_to_the_same_bits(
    zygote: Zygote, stage2: list[str], run: Path, tmp_path: Path
) -> None:
    """Rank 1 dies in a step; the other rank in a save that has its tensors and no manifest."""
    unbroken = zygote.run(*stage2, *SHARDED, "--experiment_name", "uninterrupted")
    assert unbroken.returncode == 0, unbroken.stderr
    uninterrupted = run.with_name("uninterrupted")
    for rank, fault, kept in ((1, ("die_at_step", 4), 2), (0, ("die_in_save", 6), 4)):
        ended = zygote.run(*stage2, *SHARDED, fault=("in_workers", "in_rank", rank, *fault))
        assert ended.returncode == 5
        assert f"rank {rank} was ended by SIGKILL" in ended.errors[0]
        assert stage(run, 2)["status"] == "failed"
        assert complete_steps(run)[-1] == kept
    partial = Path(shutil.copytree(run, tmp_path / "one" / "run"))
    again = zygote.run(*stage2, *SHARDED)
    assert again.returncode == 0, again.stderr
    assert "resumes from checkpoint-4" in again.stderr
    assert digest(run / "final_model") == digest(uninterrupted / "final_model")
    assert not list(run.rglob(".tmp-*"))
    assert_same_logits(run / "final_model")
    assert_resumes_on_one_process(zygote, [*stage2, "--base_output_dir", str(partial.parent)], partial, uninterrupted)


def assert_same_logits(final: Path) -> None:
    """Through from_pretrained of transformers, with the model's own code."""
    ids = torch.arange(40).reshape(2, 20)
    theirs = AutoModelForCausalLM.from_pretrained(final, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, load_causal_lm(final)(ids).logits)


def assert_resumes_on_one_process(zygote: Zygote, flags: list[str], run: Path, uninterrupted: Path) -> None:
    """One process resumes what two ranks saved in shards: the losses of the unbroken run."""
    ended = zygote.run(*flags, *WHOLE)
    assert ended.returncode == 0, ended.stderr
    assert "resumes from checkpoint-4" in ended.stderr
    losses = [[record["loss"] for record in stage(r, 2)["history"] if "loss" in record] for r in (run, uninterrupted)]
    assert len(losses[0]) == STEPS
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
