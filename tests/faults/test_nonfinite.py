"""Numbers that are not finite, in real runs (row 31)."""

import json
from pathlib import Path

import pytest

from tests.faults.harness import ROWS, STEPS, complete_steps, digest, stage
from tests.processes import Zygote

BAD_STEP = 5
TWO = ("--nproc_per_node", 2, "--per_device_train_batch_size", 1, "--global_batch_size", ROWS)


def logged_losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_infinite_gradients_end_the_run_before_the_update_and_their_rows_are_kept(
    zygote: Zygote, flags: list[str], run: Path
) -> None:
    ended = zygote.run(*flags, fault=("poison_gradients", BAD_STEP))
    assert ended.returncode == 5
    assert len(ended.errors) == 1 and f"step {BAD_STEP}: loss" in ended.errors[0]
    assert "gradient norm inf" in ended.errors[0] and "look at these rows in logs/" in ended.errors[0]
    assert stage(run)["status"] == "failed"
    assert complete_steps(run)[-1] == BAD_STEP - 1
    assert BAD_STEP not in logged_losses(run)
    kept = (run / "logs" / f"nonfinite-stage1-step{BAD_STEP}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in kept]
    assert len(records) == ROWS and all(r["text"] and r["input_ids"] for r in records)
    again = zygote.run(*flags)
    assert again.returncode == 0, again.stderr
    assert sorted(logged_losses(run)) == list(range(1, STEPS + 1))


def test_a_step_that_may_be_skipped_is_named_counted_and_not_logged(
    zygote: Zygote, flags: list[str], run: Path
) -> None:
    ended = zygote.run(*flags, "--skip_nonfinite", 1, fault=("poison_gradients", BAD_STEP))
    assert ended.returncode == 0, ended.stderr
    assert "skipped, 1 of 1 (--skip_nonfinite)" in ended.stderr
    assert sorted(logged_losses(run)) == [step for step in range(1, STEPS + 1) if step != BAD_STEP]
    state = json.loads((run / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert (state["progress"]["skipped_steps"], state["progress"]["rows"]) == (1, STEPS * ROWS)


# -- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_what_one_rank_finds_stops_all_before_the_update(zygote: Zygote, flags: list[str], run: Path) -> None:
    """As a GPU does that computes wrongly: the gradients were summed, and are infinite on one rank only."""
    ended = zygote.run(*flags, *TWO, fault=("in_workers", "in_rank", 1, "poison_gradients", BAD_STEP))
    assert ended.returncode == 5
    assert f"step {BAD_STEP}: loss" in ended.errors[0]
    assert (stage(run)["status"], complete_steps(run)[-1]) == ("failed", BAD_STEP - 1)
    assert BAD_STEP not in logged_losses(run)


@pytest.mark.faults
def test_what_one_rank_skips_all_skip(zygote: Zygote, flags: list[str], run: Path) -> None:
    for name, fault in (
        ("run", ("in_rank", 1, "poison_gradients", BAD_STEP)),
        ("both", ("poison_gradients", BAD_STEP)),
    ):
        ended = zygote.run(
            *flags, *TWO, "--experiment_name", name, "--skip_nonfinite", 1, fault=("in_workers", *fault)
        )
        assert ended.returncode == 0, ended.stderr
        assert "skipped, 1 of 1 (--skip_nonfinite)" in ended.stderr
    assert digest(run / "final_model") == digest(run.with_name("both") / "final_model")
