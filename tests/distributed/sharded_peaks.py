"""Run under torchrun: the peak of an optimizer step of small models sharded over two ranks, and the plan's number.

usage: sharded_peaks.py OUT
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks.allocated import allocated_peak
from flare.config.options import SELECTIVE
from flare.distributed import process_group
from flare.distributed.fsdp import shard_model
from flare.optim.optimizer import parameter_groups
from flare.plan.inputs import PlanInputs
from flare.plan.memory import memory
from flare.plan.optimizer_state import ADAM_STATE_BYTES
from flare.plan.trainable import Trainable
from tests.plan.models import rows_of_tokens, tiny_training

LONG = {"rows": 4, "seq_len": 256}
WIDE = {"rows": 1, "seq_len": 16, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 20000}
CASES = {
    "activations": ("all", True, False, LONG),
    "activations, fp32": ("all", False, False, LONG),
    "activations, NoPE layers": ("nope", True, False, LONG),
    "checkpointing": ("all", True, True, LONG),
    "selective": ("all", True, SELECTIVE, LONG),
    "embedding": ("all", True, False, WIDE),
    "embedding and head": ("all", True, False, WIDE | {"tie_word_embeddings": False}),
}


def measure(
    train: str, bf16: bool, checkpointing: bool | str, sizes: dict, world: process_group.World
) -> tuple[int, int]:
    """(peak without weights and moments from torch's allocator, the plan's number)."""
    model_sizes = {k: v for k, v in sizes.items() if k not in ("rows", "seq_len")}
    model, shape, trainable = tiny_training("qwen2", train, bf16, checkpointing, **model_sizes)
    ids, positions = rows_of_tokens(shape.vocab_size, sizes["rows"], sizes["seq_len"], 4)
    shard_model(model, world)
    optimizer = torch.optim.AdamW(parameter_groups(model.trainable_parameters(), 0.0), fused=True)

    def step() -> None:
        model(ids, ids, positions).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes the optimizer's state
    peak = allocated_peak(step)
    need = memory(
        PlanInputs(
            shape,
            trainable=Trainable.of("all" if train == "all" else (2, 3)),
            precision="bf16" if bf16 else "fp32",
            world_size=world.size,
            parallel="fsdp",
            per_device_batch=sizes["rows"],
            seq_len=sizes["seq_len"],
            gradient_checkpointing=checkpointing,
        )
    )
    return peak, need.peak_bytes - need.weights - ADAM_STATE_BYTES * trainable.params(shape) // world.size


def main() -> None:
    world = process_group.start(use_cuda=False, timeout_sec=120)
    found = {name: measure(*case, world) for name, case in CASES.items()}
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found))
    process_group.stop()
    process_group.end_process(0)


if __name__ == "__main__":
    main()
