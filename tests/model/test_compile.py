"""--compile: the same numbers, no new graph after the first step, a clear error without a compiler."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.allocated import allocated
from flare.config.options import SELECTIVE
from flare.errors import EnvError
from flare.hub import read_model_config
from flare.model.activation_checkpointing import checkpoint_layers
from flare.model.compile import compile_layers, uncompiled
from flare.model.patches import apply_patches
from flare.model.training_model import TrainingModel, load_for_training
from flare.nope.canary.measure import measure_canary
from flare.nope.config_json import with_nope
from flare.plan.trainable import Trainable
from flare.run.optional_packages import check_compiler
from tests.processes import train
from tests.train.test_runs import losses

LENGTH = 24


def load(directory: Path, trainable: Trainable) -> TrainingModel:
    config = with_nope(read_model_config(directory), [1, 3], None, "test")
    model = load_for_training(directory, config, trainable, "fp32", "auto").train()
    apply_patches(model)
    return model


def batch(step: int, rows: int = 2) -> dict[str, torch.Tensor]:
    """Random rows; in step 0 one document each, later several with changing bounds."""
    rng = np.random.default_rng(step)
    position_ids = np.tile(np.arange(LENGTH), (rows, 1))
    if step:
        cut = 3 * step
        position_ids[0, cut:] = np.arange(LENGTH - cut)
    arrays = (rng.integers(0, 300, (rows, LENGTH)), rng.integers(0, 300, (rows, LENGTH)), position_ids)
    return dict(zip(("input_ids", "labels", "position_ids"), map(torch.from_numpy, arrays), strict=True))


def assert_equal_to_eager(compiled: TrainingModel, eager: TrainingModel, step: int) -> None:
    """fp32: loss and every gradient within 1e-5, small gradients measured against the norm of all gradients."""
    losses = []
    for model in (compiled, eager):
        model.zero_grad()
        losses.append(model(**batch(step)))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    expected = {name: p.grad for name, p in eager.trainable_parameters()}
    floor = 1e-3 * torch.stack([g.norm() for g in expected.values()]).norm()
    for name, parameter in compiled.trainable_parameters():
        assert (parameter.grad - expected[name]).norm() / max(expected[name].norm(), floor) < 1e-5, name


def run_steps(base: Path, trainable: Trainable, checkpointing: bool | str, backend: str) -> list[int]:
    """The number of graphs after each of four steps, each followed by an evaluation."""
    torch._dynamo.reset()
    counters.clear()
    compiled, eager = load(base, trainable), load(base, trainable)
    if checkpointing:
        checkpoint_layers(compiled.causal_lm, checkpointing == SELECTIVE)
    compile_layers(compiled, backend)
    graphs = []
    for step in range(4):
        assert_equal_to_eager(compiled, eager, step)
        compiled.eval().score(**batch(step, rows=1))
        compiled.train()
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.parametrize("checkpointing", [False, SELECTIVE, True])
@pytest.mark.parametrize(("trainable", "kinds"), [(Trainable(True), 2), (Trainable(False, (1, 3)), 4)])
def test_no_graph_is_made_after_the_first_step(
    base: Path, trainable: Trainable, kinds: int, checkpointing: bool | str
) -> None:
    """One graph for each kind of layer: RoPE and NoPE; with frozen layers also below and above a trainable one.

    aot_eager traces forward and backward pass like inductor, and generates no code: seconds instead of minutes.
    """
    assert run_steps(base, trainable, checkpointing, "aot_eager") == [kinds] * 4


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, SELECTIVE, True])
def test_compiled_code_gives_the_loss_and_gradients_of_eager(base: Path, checkpointing: bool | str) -> None:
    assert run_steps(base, Trainable(False, (1, 3)), checkpointing, "inductor") == [4] * 4


def test_a_compiled_layer_keeps_what_an_eager_one_keeps_with_selective_checkpointing(base: Path) -> None:
    """Bytes allocated after a forward pass. Without checkpointing the graph keeps more (but less than eager)."""
    kept = {}
    for name, selective, compiled in (("eager", True, False), ("compiled", True, True), ("none", False, True)):
        torch._dynamo.reset()
        model, outputs = load(base, Trainable(True)), []
        if selective:
            checkpoint_layers(model.causal_lm, selective=True)
        if compiled:
            compile_layers(model, "aot_eager")
        model(**batch(1)).backward()
        kept[name] = allocated(lambda model=model, outputs=outputs: outputs.append(model(**batch(1))))[-1]
    assert kept["compiled"] == pytest.approx(kept["eager"], rel=0.05)
    assert kept["compiled"] < 0.75 * kept["none"]


def test_the_canary_of_a_compiled_model_is_measured_uncompiled(base: Path) -> None:
    """Its sequences are long and single, and its layers are cast to the saved dtype: not worth compiling."""
    torch._dynamo.reset()
    model = load(base, Trainable(True))
    expected = measure_canary(model.causal_lm)
    compile_layers(model, "aot_eager")
    model(**batch(1)).backward()
    with uncompiled(model):
        assert measure_canary(model.causal_lm) == expected


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one(train_flags: list[str], tmp_path: Path) -> None:
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        result = train(*train_flags, "--experiment_name", name, *flags, timeout=600)
        assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    assert losses(out / "compiled") == pytest.approx(losses(out / "eager"), rel=1e-5)
    assert "each decoder layer is compiled" in (out / "compiled" / "training.log").read_text()


def test_a_missing_compiler_is_one_error_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(EnvError, match=r"--compile needs a compiler, and g\+\+ is not found"):
        check_compiler(use_cuda=False)
    monkeypatch.setenv("CXX", "my-c++")
    with pytest.raises(EnvError, match=r"CXX=my-c\+\+ is not found"):
        check_compiler(use_cuda=False)
