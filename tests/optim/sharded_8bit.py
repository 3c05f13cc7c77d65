"""Run under torchrun: 8-bit moments of matrices that two ranks share, against those of one process.

usage: sharded_8bit.py OUT_DIR
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from flare.checkpoint.tensor_files import TensorReader, write_tensors
from flare.config.options import Options
from flare.distributed import process_group
from flare.distributed.fsdp import full_tensor
from flare.distributed.process_group import World
from flare.optim.optimizer import build_optimizer, load_optimizer_tensors, optimizer_step, optimizer_tensors

SHAPES = {"uneven": (33, 512), "one_row": (1, 4096), "vector": (5000,)}


class Weights(torch.nn.Module):
    """Parameters of these shapes, the same on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in SHAPES.items():
            setattr(self, name, torch.nn.Parameter(torch.randn(shape)))


def build(sharded: bool, kind: str = "adamw_torch_8bit") -> torch.optim.Optimizer:
    model = fully_shard(Weights()) if sharded else Weights()
    return build_optimizer(model.named_parameters(), Options(optim=kind, learning_rate=1e-3))


def run(optimizer: torch.optim.Optimizer, steps: int = 3) -> torch.optim.Optimizer:
    """Steps with the same gradients for every layout."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = torch.randn(parameter.shape, generator=generator)
                shards = getattr(parameter, "device_mesh", None)
                parameter.grad = distribute_tensor(gradient, shards, parameter.placements) if shards else gradient
        optimizer_step(optimizer, 1e-3)
    return optimizer


def state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Full weights and moments. A collective."""
    weights = {n: p.detach() for g in optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True)}
    return {name: full_tensor(tensor).clone() for name, tensor in (weights | optimizer_tensors(optimizer)).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state(optimizer).items() if "|" in name}


def read_back(out: Path, world: World, optimizer: torch.optim.Optimizer, sharded: bool, kind: str) -> dict:
    """The moments of an optimizer of this kind that has read what this one has written."""
    write_tensors(optimizer_tensors(optimizer), out, "optimizer", world)
    torch.distributed.barrier()
    other = build(sharded, kind)
    load_optimizer_tensors(other, TensorReader.of_state(out, "optimizer"))
    torch.distributed.barrier()
    return moments(other)


def main() -> None:
    out = Path(sys.argv[1])
    world = process_group.start(use_cuda=False, timeout_sec=120)
    one, two = run(build(False)), run(build(True))
    fp32 = run(build(True, "adamw_torch_fused"))
    rounded = [read_back(out, world, fp32, sharded, "adamw_torch_8bit") for sharded in (True, False)]
    found = {
        "in 8 bits": sum(name.endswith("exp_avg|codes") for name in optimizer_tensors(two)),
        "same as one process": same(state(one), state(two)),
        "read by one process": same(moments(one), read_back(out, world, two, False, "adamw_torch_8bit")),
        "read by two": same(moments(one), read_back(out, world, two, True, "adamw_torch_8bit")),
        "rounded from fp32": same(*rounded),
    }
    if world.is_main:
        (out / "found.json").write_text(json.dumps(found))
    process_group.stop()
    process_group.end_process(0)


if __name__ == "__main__":
    main()
