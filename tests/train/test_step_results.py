"""Results that the host reads one step late, as on a GPU. Here on the CPU, whose fused AdamW reads the same flag."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flare.data.token_cache.cache import TokenCache
from flare.errors import FlareError
from flare.files import write_json
from flare.plan.trainable import Trainable
from flare.train.metrics import Throughput, perplexity
from flare.train.step_results import PendingResults
from flare.train.trainer import Trainer
from tests.processes import torchrun
from tests.train.test_training import cache, load, trainer  # noqa: F401 (a fixture)


def lagging(base: Path, cache: TokenCache, tmp_path: Path, **changes: object) -> Trainer:  # noqa: F811
    runner = trainer(load(base, [1, 3], Trainable(True)), cache, tmp_path, **changes)
    runner.pending = PendingResults(torch.device("cpu"), lag=1)
    return runner


def poison(runner: Trainer, step: int) -> None:
    """Make the loss of one step (0-based) infinite, and its gradients with it."""
    forward = runner.module.forward

    def poisoned(**batch: torch.Tensor) -> torch.Tensor:
        return forward(**batch) * (float("inf") if runner.train_state.step == step else 1.0)

    runner.module.forward = poisoned


def weights(runner: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in runner.components.model.trainable_parameters()}


def test_a_lag_changes_no_loss_and_no_weight(base: Path, cache: TokenCache, tmp_path: Path) -> None:  # noqa: F811
    late, prompt = lagging(base, cache, tmp_path), trainer(load(base, [1, 3], Trainable(True)), cache, tmp_path)
    results = []
    for _ in range(4):
        known = late._step()
        assert known == (results[-1] if results else None)  # the step before
        results.append(prompt._step())
    late._read_results()
    assert late.window == results
    for name, weight in weights(prompt).items():
        assert torch.equal(weight, weights(late)[name]), name


def test_an_update_that_is_not_finite_is_never_applied_though_the_host_reads_it_later(
    base: Path,
    cache: TokenCache,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Step 3 is poisoned. It and step 4, which was queued before the host knew, leave the weights of step 2."""
    runner = lagging(base, cache, tmp_path)
    poison(runner, step=2)
    for _ in range(2):
        runner._step()
    before = weights(runner)
    runner._step()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(runner).items())
    with pytest.raises(FlareError, match=r"step 3: loss inf .*weights were not updated"):
        runner._step()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(runner).items())
    assert (runner.train_state.step, runner.train_state.rows) == (2, 8)  # these numbers go into the status


def test_a_step_is_saved_only_after_its_result_is_read(
    base: Path,
    cache: TokenCache,  # noqa: F811
    tmp_path: Path,
) -> None:
    runner = lagging(base, cache, tmp_path, save_steps=1)
    poison(runner, step=2)
    saved: list[int] = []
    runner.callbacks = replace(runner.callbacks, save=lambda train_state: saved.append(train_state.step))
    with pytest.raises(FlareError, match="step 3"):
        runner.train()
    assert saved == [1, 2]


def test_two_ranks_that_read_late_stop_at_the_same_step(
    base: Path, corpus: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Only rank 1 is asked to stop, in its third step. Both ranks read the vote one step later."""
    out = tmp_path / "stops.json"
    torchrun(2, "tests.train.late_stop", base, corpus, cache_dir, out)
    assert json.loads(out.read_text()) == [["stopped", 4, [4]]] * 2


def test_the_perplexity_of_a_diverged_run_can_be_written_as_json(tmp_path: Path) -> None:
    """JSON has no infinity: neither the checkpoint nor the status could be written."""
    write_json(tmp_path / "record.json", {"perplexity": perplexity(1e6)})
    assert json.loads((tmp_path / "record.json").read_text())["perplexity"] > 1e307
    assert perplexity(0.0) == 1.0


def test_throughput_excludes_the_time_while_its_clock_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter = Throughput()
    for tokens in (60, 40):
        meter.start()
        meter.add(tokens)
        meter.stop()
    meter.stop()  # is stopped already
    assert meter.take() == 100 / 5
    assert meter.take() == 0.0
