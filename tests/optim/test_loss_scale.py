"""Steps that overflow are skipped and halve the loss scale; good steps double it."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from flare.data.token_cache.cache import TokenCache
from flare.errors import FlareError
from flare.optim.loss_scale import LossScale
from flare.optim.optimizer import optimizer_tensors
from flare.train.step_results import PendingResults
from flare.train.trainer import Trainer
from tests.conftest import write_base
from tests.optim.fp16 import fp16
from tests.optim.overflow_ranks import BROKEN
from tests.processes import torchrun
from tests.train.test_step_results import poison, weights
from tests.train.test_training import cache  # noqa: F401 (a fixture)


@pytest.fixture(params=[0, 1], ids=["lag 0", "lag 1"])
def runner(request: pytest.FixtureRequest, base: Path, cache: TokenCache, tmp_path: Path) -> Trainer:  # noqa: F811
    """Reads each step's numbers at once, or a step later as on a GPU."""
    runner = fp16(base, cache, tmp_path)
    runner.pending = PendingResults(torch.device("cpu"), request.param, runner.loss_scale)
    return runner


def test_an_overflow_leaves_8_bit_moments_as_they_were(cache: TokenCache, tmp_path: Path) -> None:  # noqa: F811
    wide = write_base(tmp_path / "wide", hidden_size=128, intermediate_size=256)
    runner = fp16(wide, cache, tmp_path, optim="adamw_torch_8bit")
    forward = runner.module.forward
    runner.module.forward = lambda **batch: forward(**batch) * (1e7 if runner.train_state.step == 1 else 1.0)
    held = []
    for _ in range(3):
        runner._step()
        tensors = optimizer_tensors(runner.components.optimizer) | weights(runner)
        held.append({name: tensor.clone() for name, tensor in tensors.items()})
    assert any(name.endswith("|codes") for name in held[0])
    assert all(torch.equal(tensor, held[1][name]) for name, tensor in held[0].items())
    assert not all(torch.equal(tensor, held[2][name]) for name, tensor in held[1].items())


def test_an_overflow_is_skipped_counted_and_halves_the_scale(
    runner: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 2 of three, whatever --skip_nonfinite is; with a lag the device decides, and the host learns it later."""
    forward = runner.module.forward
    runner.module.forward = lambda **batch: forward(**batch) * (1e7 if runner.train_state.step == 1 else 1.0)
    held = [weights(runner)]
    with caplog.at_level("INFO", logger="flare"):
        for _ in range(3):
            runner._step()
            held.append(weights(runner))
        runner._read_results()
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(held)]
    assert changed == [True, False, True]
    adam_steps = {state["step"].item() for state in runner.components.optimizer.state.values()}
    assert adam_steps == {2.0}
    state = runner.train_state
    assert (state.step, state.rows, state.overflow_steps, state.skipped_steps) == (3, 12, 1, 0)
    assert (state.loss_scale, state.good_steps) == (2.0**15, 1)
    assert len(runner.window) == 3
    assert "step 2: the gradients overflow fp16, no update; loss scale 32768 from here on" in caplog.text


def test_the_log_has_the_scale_and_a_norm_that_json_can_hold(
    base: Path,
    cache: TokenCache,  # noqa: F811
    tmp_path: Path,
) -> None:
    runner = fp16(base, cache, tmp_path)
    runner.loss_scale.scale.fill_(2.0**40)
    runner._step()
    runner._log()
    (record,) = runner.train_state.history
    assert (record["grad_norm"], record["loss_scale"], record["overflow_steps"]) == (None, 2.0**39, 1)
    json.dumps(record, allow_nan=False)


def test_a_loss_that_is_not_finite_is_an_error_in_fp16_too(runner: Trainer) -> None:
    poison(runner, step=1)
    runner._step()
    before = weights(runner)
    with pytest.raises(FlareError, match=r"step 2: loss inf .*not updated.*fp16 ends at 65,504: use --precision fp32"):
        for _ in range(2):
            runner._step()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(runner).items())
    assert runner.train_state.overflow_steps == 0


def test_gradients_that_overflow_at_any_scale_are_an_error(runner: Trainer) -> None:
    """From a scale of 2: one overflow leaves 1, the second one nothing to try; in between nothing is updated."""
    runner.loss_scale.scale.fill_(2.0)
    unscale = runner.loss_scale.unscale

    def broken(parameters: list[torch.nn.Parameter]) -> None:
        unscale(parameters)
        parameters[0].grad.fill_(float("nan"))

    runner.loss_scale.unscale = broken
    before = weights(runner)
    with pytest.raises(FlareError, match=r"step 2: loss [\d.]+ and gradient norm nan are not finite"):
        for _ in range(4):
            runner._step()
    assert (runner.train_state.step, runner.train_state.overflow_steps) == (1, 1)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(runner).items())


def test_good_steps_double_the_scale_at_torchs_pace() -> None:
    ours = LossScale(torch.device("cpu"), 1024.0, good_steps=1998)
    for expected in ((1024.0, 1999), (2048.0, 0), (2048.0, 1)):
        ours.update(torch.zeros(()))
        assert (ours.scale.item(), ours.good_steps.item()) == expected


@pytest.mark.parametrize(
    ("parallel", "lag"),
    [
        pytest.param("ddp", 0, marks=pytest.mark.slow),
        pytest.param("ddp", 1, marks=pytest.mark.slow),
        ("fsdp", 0),
        pytest.param("fsdp", 1, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_skip_the_same_steps_and_have_the_same_scale(
    base: Path, corpus: Path, cache_dir: Path, tmp_path: Path, parallel: str, lag: int
) -> None:
    """From a scale of 2**34 down to what fits; then once more, for a gradient of rank 1 alone."""
    out = tmp_path / "found.json"
    torchrun(2, "tests.optim.overflow_ranks", base, corpus, cache_dir, out, parallel, lag)
    first, second = json.loads(out.read_text())
    assert first == second
    scales, changed = first["scales"], first["changed"]
    assert 5 < changed.index(True) < BROKEN
    assert (changed[BROKEN - 1], changed[BROKEN]) == (True, False)
    for scale, before, updated in zip(scales, [2.0**34, *scales], changed, strict=False):
        assert scale == (before if updated else before / 2)
    assert first["overflow_steps"] == changed.count(False)
