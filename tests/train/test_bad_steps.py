"""Steps whose loss or gradients are not finite, and the watchdog's clock around each step."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flare.data.token_cache.cache import TokenCache
from flare.distributed import process_group
from flare.errors import FlareError
from flare.plan.trainable import Trainable
from tests.train.test_training import cache, load, trainer  # noqa: F401 (a fixture)


def test_nan_stops_before_the_update(cache: TokenCache, base: Path, tmp_path: Path) -> None:  # noqa: F811
    model = load(base, [1], Trainable(True))
    runner = trainer(model, cache, tmp_path)
    with torch.no_grad():
        model.causal_lm.model.norm.weight[0] = float("nan")
    before = {n: p.detach().clone() for n, p in model.trainable_parameters()}
    with pytest.raises(FlareError, match=r"step 1: loss nan .*not updated"):
        runner._step()
    for name, parameter in model.trainable_parameters():
        assert torch.equal(parameter, before[name]) or "model.norm" in name
    assert runner.train_state.step == 0


def test_skipped_steps_leave_the_weights_and_one_more_ends_the_run(
    cache: TokenCache,  # noqa: F811
    base: Path,
    tmp_path: Path,
) -> None:
    """Steps 2, 3 and 4 of ten are infinite; two may be."""
    model = load(base, [1], Trainable(True))
    runner = trainer(model, cache, tmp_path, skip_nonfinite=2)
    reported: list[int] = []
    runner.callbacks = replace(runner.callbacks, write_bad_rows=lambda step, rows: reported.append(step))
    forward, weights = model.forward, []
    bad = (1, 2, 3)
    runner.module.forward = lambda **batch: forward(**batch) * (torch.inf if runner.train_state.step in bad else 1.0)
    for _ in range(3):
        runner._step()
        weights.append(model.causal_lm.model.norm.weight.detach().clone())
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert (runner.train_state.step, runner.train_state.rows, runner.train_state.skipped_steps) == (3, 12, 2)
    assert len(runner.window) == 1  # what is not finite is never logged as a number
    with pytest.raises(FlareError, match=r"step 4: loss inf .*look at these rows in logs/"):
        runner._step()
    assert reported == [2, 3, 4]
    assert torch.equal(weights[0], model.causal_lm.model.norm.weight)


def test_ranks_wait_for_each_other_only_while_the_watchdog_runs(
    cache: TokenCache,  # noqa: F811
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in a log line's collective: a rank that hung there was not noticed for 27 minutes."""
    one = trainer(load(base, [1], Trainable(True)), cache, tmp_path, max_steps=2, logging_steps=1)
    running: list[int] = []

    @contextlib.contextmanager
    def watch(step: int) -> Iterator[None]:
        running.append(step)
        yield
        running.pop()

    waits: list[list[int]] = []
    all_reduce_max = process_group.all_reduce_max
    monkeypatch.setattr(
        process_group, "all_reduce_max", lambda values: waits.append(running.copy()) or all_reduce_max(values)
    )
    one.callbacks = replace(one.callbacks, watch_step=watch)
    one.train()
    assert waits == [[1], [2]]
