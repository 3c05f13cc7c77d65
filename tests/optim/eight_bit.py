"""Optimizers over random parameters, for the tests of ``--optim adamw_torch_8bit``."""

from pathlib import Path

import pytest
import torch

from flare.checkpoint.tensor_files import TensorReader
from flare.config.options import Options
from flare.nope.weight_files import save_tensors
from flare.optim import optimizer as optimizer_module
from flare.optim.optimizer import build_optimizer, optimizer_step, optimizer_tensors
from flare.plan.optimizer_state import EIGHT_BIT
from flare.run import optional_packages

needs_torchao = pytest.mark.skipif(
    optional_packages.find_spec("torchao") is None, reason="torchao is not installed (requirements-dev.txt)"
)


SHAPES = {
    "wide": (96, 512), "tall": (512, 256), "narrow": (64, 128), "odd": (130, 96), "bias": (512,), "small": (8, 256),
}  # fmt: skip


def build(kind: str = EIGHT_BIT, seed: int = 0, **shapes: tuple) -> torch.optim.Optimizer:
    torch.manual_seed(seed)
    named = [(name, torch.nn.Parameter(torch.randn(shape))) for name, shape in (shapes or SHAPES).items()]
    return build_optimizer(named, Options(optim=kind, learning_rate=1e-3, weight_decay=0.1))


def run(optimizer: torch.optim.Optimizer, steps: range = range(5)) -> dict[str, torch.Tensor]:
    """Steps with gradients that depend on the step only; returns the parameters."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for _, parameter in optimizer_module.named_parameters(optimizer):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer_step(optimizer, 1e-3 / (step + 1))
    return {name: parameter.detach() for name, parameter in optimizer_module.named_parameters(optimizer)}


def stored(optimizer: torch.optim.Optimizer, directory: Path) -> TensorReader:
    directory.mkdir(exist_ok=True)
    save_tensors(optimizer_tensors(optimizer), directory / "optimizer.safetensors")
    return TensorReader.of_state(directory, "optimizer")
