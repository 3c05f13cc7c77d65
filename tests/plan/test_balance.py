"""Rows by speed: the arithmetic by hand, and real processes of which one is slowed on purpose."""

import json
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flare.data.order import portion
from flare.errors import ConfigError
from flare.plan.balance import (
    Balance,
    allocate_rows,
    balance_by_speed,
    balance_by_weights,
    balance_from_checkpoint,
    balance_summary,
    equal_balance,
    fastest_subset,
    format_rows,
    parse_weights,
    speedup_over_equal,
    step_time,
)
from tests.processes import torchrun, train
from tests.train.test_runs import assert_same_weights, losses

A800, A40 = "NVIDIA A800-SXM4-80GB", "NVIDIA A40"


# -- arithmetic -------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.5, 1.0, 1.7, 3.0]), min_size=1, max_size=4), st.integers(0, 6))
def test_no_other_division_ends_a_step_earlier(speeds: list[float], extra: int) -> None:
    """Against every way to share the rows."""
    total = len(speeds) + extra
    found = step_time(allocate_rows(total, speeds), speeds)
    cuts = combinations_with_replacement(range(extra + 1), len(speeds) - 1)
    every = (np.diff([0, *cut, extra]) + 1 for cut in cuts)
    assert found == min(step_time(rows, speeds) for rows in every)


def test_shares_are_proportional_where_rows_allow_it() -> None:
    assert allocate_rows(30, [9.0, 1.0]) == [27, 3]
    assert allocate_rows(4, [2.0, 1.0]) == [3, 1]
    assert allocate_rows(12, [312.0, 312.0, 149.7]) == [5, 5, 2]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 50))
def test_portions_cover_all_rows_once(counts: list[int], num_rows: int) -> None:
    parts = [portion(np.arange(num_rows), counts, rank) for rank in range(len(counts))]
    assert np.concatenate(parts).tolist() == list(range(num_rows))


def test_measured_speeds_decide_and_like_ones_do_not() -> None:
    assert balance_by_speed(8, ["a", "b"], [0.1, 0.3]).rows == (6, 2)
    alike = balance_by_speed(8, ["a", "b"], [0.100, 0.104])
    assert alike.rows == (4, 4)
    assert "alike" in alike.reason
    assert equal_balance(5, 2).rows == (3, 2)
    assert balance_by_weights(8, [3, 1]).rows == (6, 2)


def test_a_record_is_taken_over_on_the_same_gpus_only() -> None:
    record = json.loads(json.dumps(balance_by_speed(8, ["a", "b"], [0.1, 0.3]).as_dict()))
    again = balance_from_checkpoint(record, 8, ["a", "b"])
    assert again is not None
    assert again.rows == (6, 2)
    assert balance_from_checkpoint(again.as_dict(), 8, ["a", "b"]) == again  # and so on, resume after resume
    assert balance_from_checkpoint(record, 8, ["b", "a"]) is None
    assert balance_from_checkpoint(record, 9, ["a", "b"]) is None
    assert balance_from_checkpoint(equal_balance(8, 2).as_dict(), 8, ["a", "b"]) is None
    assert balance_from_checkpoint(None, 8, ["a", "b"]) is None
    older = {**record, "cards": record["gpus"]}  # the key's name in checkpoints of November 2026
    del older["gpus"]
    assert balance_from_checkpoint(older, 8, ["a", "b"]) == again


@pytest.mark.parametrize("value", ["fast", "3,", "3,0", "3,-1", "nan,1", "3;1", ""])
def test_other_words_are_refused_by_name(value: str) -> None:
    with pytest.raises(ConfigError, match="--balance must be auto, measure, equal, or numbers above 0"):
        parse_weights(value, 2)


def test_one_weight_for_each_process() -> None:
    assert parse_weights("3,1.5", 2) == [3.0, 1.5]
    assert parse_weights("auto", 2) is None
    with pytest.raises(ConfigError, match="--balance 3,1 has 2 weights for 4 processes"):
        parse_weights("3,1", 4)


# -- the plan -----------------------------------------------------------------------------------------------------


def test_the_plan_states_the_gain() -> None:
    """312 and 149.7 TFLOP/s, 12 rows: 6 rows of an A40 against 8 of an A800, in time 6 / 149.7 and 8 / 312."""
    assert speedup_over_equal(12, [312.0, 149.7]) == pytest.approx((6 / 149.7) / (4 / 149.7), rel=1e-6)
    words = balance_summary("auto", 12, [A800, A40])
    assert f"by peak rates 8 for {A800}, 4 for {A40}, about 1.50x equal shares" in words
    assert "leaving out" not in words
    assert "by speed a step would be about 1.50x faster (--balance auto)" in balance_summary("equal", 12, [A800, A40])
    assert balance_summary("2,1", 12, [A800, A40]) == f"rows by hand: 8 for {A800}, 4 for {A40}"
    assert balance_summary("auto", 12, [A40, A40]) == ""


def test_the_plan_says_when_a_slow_gpu_is_better_left_out() -> None:
    """Two rows: an H200 does both in 2 / 989, and waits 1 / 71 for a 3090 that does one."""
    h200, rtx = "NVIDIA H200", "NVIDIA GeForce RTX 3090"
    assert fastest_subset(2, [71.0, 989.0]) == (1, pytest.approx((1 / 71) / (2 / 989)))
    assert fastest_subset(64, [71.0, 989.0]) == (2, 1.0)
    assert f"leaving out {rtx} would be about 6.96x faster still" in balance_summary("auto", 2, [h200, rtx])


def test_an_unknown_gpu_gets_no_estimate() -> None:
    words = balance_summary("auto", 8, [A800, "NVIDIA Quadro K420"])
    assert (
        words
        == "rows by speed, measured at the start; no estimate, because the rate of NVIDIA Quadro K420 is not known"
    )


def test_equal_neighbours_are_named_once() -> None:
    assert format_rows(["a", "a", "b"], [3, 3, 1]) == "3 for each of 2 x a, 1 for b"


# -- real processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow  # test_runs has three ranks with unequal shares by default
def test_unequal_shares_give_the_loss_and_gradients_of_one_process(
    base: Path, corpus: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """fp32, relative 1e-5: two ranks with 5 rows and 1, in micro-batches of 2: 3 passes against 1, or, sharded, 3
    against one and two empty ones."""
    results = []
    for processes, rows, parallel in ((1, "6", "ddp"), (2, "5,1", "ddp"), (2, "5,1", "fsdp")):
        out = tmp_path / f"{processes}{parallel}.pt"
        torchrun(processes, "tests.train.rank_gradients", base, corpus, cache_dir, out, 2, 6, parallel, rows)
        results.append(torch.load(out))
    one = results[0]
    floor = 1e-3 * torch.stack([g.norm() for g in one["gradients"].values()]).norm()
    for two in results[1:]:
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        for name, gradient in one["gradients"].items():
            assert (two["gradients"][name] - gradient).norm() / max(gradient.norm(), floor) < 1e-5, name


def test_a_slow_rank_gets_fewer_rows(tmp_path: Path) -> None:
    """A rank that does every pass four times over; measured by the same code as in a run."""
    out = tmp_path / "balance.json"
    torchrun(2, "tests.plan.slow_rank", out)
    first, second = json.loads(out.read_text())
    assert first == second  # all ranks decided alike
    found = Balance(**first)
    assert sum(found.rows) == 12
    assert found.rows[0] > found.rows[1]
    assert found.reason == "by measured speed"


@pytest.mark.slow
def test_shares_by_hand_and_resume_with_the_measured_ones(train_flags: list[str], tmp_path: Path) -> None:
    """``3,1`` trains as equal shares do; a run that has measured keeps its measurement."""
    flags = [*train_flags, "--nproc_per_node", "2", "--save_steps", "3"]
    for name, balance in (("equal", "equal"), ("weights", "3,1"), ("measured", "measure")):
        result = train(*flags, "--experiment_name", name, "--balance", balance, "--max_steps", "3")
        assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    assert "rows of a step by rank: [3, 1] (--balance 3,1)" in (out / "weights" / "training.log").read_text()
    assert losses(out / "weights") == pytest.approx(losses(out / "equal"), rel=1e-5)
    assert_same_weights(out / "weights" / "final_model", out / "equal" / "final_model", relative=1e-3)

    state = json.loads((out / "measured" / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
    assert len(state["balance"]["seconds_per_row"]) == 2
    result = train(*flags, "--experiment_name", "measured", "--balance", "measure", "--max_steps", "4")
    assert result.returncode == 0, result.stderr
    assert "measuring each rank" not in result.stderr
    assert (
        f"rows of a step by rank: {state['balance']['rows']} ({state['balance']['reason']}, as before)"
        in result.stderr
    )


def test_a_wrong_number_of_weights_is_one_line(train_flags: list[str], tmp_path: Path) -> None:
    result = train(*train_flags, "--nproc_per_node", "2", "--balance", "1,2,3")
    assert result.returncode == 2
    assert result.stderr == "error: --balance 1,2,3 has 3 weights for 2 processes; give one for each\n"
    assert not (tmp_path / "out").exists()
