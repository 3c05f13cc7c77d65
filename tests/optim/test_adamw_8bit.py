"""``--optim adamw_torch_8bit``: the update is torchao's, and stays near that of fp32 moments."""

import pytest
import torch

from benchmarks.allocated import allocated_peak
from flare.optim import optimizer as optimizer_module
from flare.optim.optimizer import optimizer_step
from flare.plan import optimizer_state
from flare.plan.optimizer_state import block_size
from tests.optim.eight_bit import SHAPES, build, needs_torchao, run


@needs_torchao
def test_the_update_is_torchaos_bit_for_bit() -> None:
    """Where rows are a multiple of 256, torchao's own blocks are ours."""
    shapes = {name: SHAPES[name] for name in ("wide", "tall", "bias", "small")}
    ours = build(**shapes)
    from torchao.optim import AdamW8bit

    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes.values()]
    groups = [
        {"params": [p for p in params if p.ndim == 2], "names": ["wide", "tall", "small"], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim == 1], "names": ["bias"], "weight_decay": 0.0},
    ]
    theirs = AdamW8bit(groups, lr=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(run(ours).values(), run(theirs).values(), strict=True))
    kinds = {name: type(theirs.state[p]["exp_avg"]).__name__ for name, p in optimizer_module.named_parameters(theirs)}
    assert kinds == {"wide": "OptimState8bit", "tall": "OptimState8bit", "small": "Tensor", "bias": "Tensor"}


@needs_torchao
def test_the_weights_stay_near_those_of_fp32_moments() -> None:
    """Twenty steps: the distance from fp32's weights as a share of the way that these have gone. What has fp32
    moments in both differs by rounding."""
    eight, plain = run(build(), range(20)), run(build("adamw_torch"), range(20))
    start = run(build("adamw_torch"), range(0))
    for name, weight in plain.items():
        moved, apart = (weight - start[name]).norm(), (weight - eight[name]).norm()
        assert apart < (0.02 if block_size(SHAPES[name]) else 5e-4) * moved, (name, apart / moved)


@needs_torchao
@pytest.mark.slow
def test_the_compiled_update_of_gpus_is_the_eager_one_of_cpus() -> None:
    """To a code's rounding; and it needs the two fp32 moments that the plan counts for GPUs, nothing else."""
    eager, compiled = build(only=(64, 512)), build(only=(64, 512))
    weights = run(eager)["only"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_module, "is_8bit", lambda optimizer: False)  # no care for the CPU
        torch.testing.assert_close(run(compiled)["only"], weights, rtol=1e-4, atol=1e-5)
        peak = allocated_peak(lambda: optimizer_step(compiled, 1e-3))
    assert peak == pytest.approx(optimizer_state.COMPILED_UPDATE_BYTES * 64 * 512, rel=0.02)
