"""Run under torchrun: models sharded by FSDP2 and the same models unsharded, on the same batch; writes what differs.

usage: sharded_cases.py QWEN2 QWEN3_UNTIED OUT
"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flare.checkpoint import tensor_files
from flare.checkpoint.directory import Checkpoint, model_tensors, write_checkpoint
from flare.checkpoint.tensor_files import TensorReader, restore_weights
from flare.config.options import SELECTIVE, Options
from flare.data.packing import PackedRows
from flare.distributed import ddp, process_group
from flare.distributed.fsdp import full_tensor, is_sharded
from flare.distributed.process_group import World
from flare.errors import CheckpointError
from flare.evaluation.during_training import LengthCurve
from flare.hub import read_model_config
from flare.model.patches import apply_patches
from flare.model.training_model import TrainingModel, load_for_training, load_in_place
from flare.nope.canary.measure import write_canary
from flare.nope.config_json import with_nope, write_config
from flare.nope.load import load_causal_lm
from flare.nope.probe import verify_nope
from flare.optim.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from flare.plan.trainable import Trainable
from flare.train.step_results import PendingResults

LAYERS = [1, 3]
CASES = {
    "everything": (Trainable.of("all"), "fp32", False),
    "everything, checkpointed": (Trainable.of("all"), "fp32", True),
    "NoPE layers": (Trainable.of(LAYERS), "fp32", False),
    "attention of NoPE layers, checkpointed": (Trainable.of(LAYERS, True), "fp32", True),
    "everything, selective": (Trainable.of("all"), "fp32", SELECTIVE),
    "bf16, everything": (Trainable.of("all"), "bf16", False),
    "bf16, attention of NoPE layers": (Trainable.of(LAYERS, True), "bf16", False),
    "fp16, everything": (Trainable.of("all"), "fp16", False),
    "fp16, attention of NoPE layers": (Trainable.of(LAYERS, True), "fp16", False),
}


def rows_of(model: TrainingModel, count: int) -> list[torch.Tensor]:
    """(input_ids, labels, position_ids) of random rows with two documents each, the same on every rank."""
    torch.manual_seed(0)
    ids = torch.randint(0, model.causal_lm.config.vocab_size, (count, 33))
    positions = torch.cat([torch.arange(20), torch.arange(12)]).expand(count, -1)
    return [ids[:, :-1], ids[:, 1:].clone(), positions]


def gradients(model: TrainingModel, rows: list[torch.Tensor], world: World, mean_over: int) -> dict[str, torch.Tensor]:
    """Loss, gradient norm and gradients of these rows of this rank, as the trainer scales them."""
    loss = model(*rows) * mean_over
    loss.backward()
    found = {name: full_tensor(p.grad) for name, p in model.trainable_parameters()}
    norm = ddp.clip_gradients([p for _, p in model.trainable_parameters()], 1e9)
    total = sum(process_group.run_on_all_ranks(world, loss.item)) / world.size if mean_over > 1 else loss.item()
    return {"loss": torch.tensor(total), "norm": norm} | found


def worst(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest relative difference; of a gradient by its norm, but at least a thousandth of the norm of all."""
    assert one.keys() == other.keys()
    floor = 1e-3 * one["norm"]
    return max(((other[k].float() - v.float()).norm() / max(v.float().norm(), floor)).item() for k, v in one.items())


def compare(base: Path, case: str, world: World) -> dict:
    """Loss and gradients of a sharded model, half of the rows per rank, and of an unsharded one with all rows."""
    trainable, precision, checkpointed = CASES[case]
    config = with_nope(read_model_config(base), LAYERS, None, str(base))
    plain = load_for_training(base, config, trainable, precision, "auto")
    sharded = load_in_place(base, config, trainable, precision, "auto", world)
    for model in (plain, sharded):
        apply_patches(model, gradient_checkpointing=checkpointed)
    verify_nope(sharded.causal_lm, LAYERS, decode=sharded.decode)
    rows = rows_of(plain, 2 * world.size)
    mine = [tensor[2 * world.rank : 2 * world.rank + 2] for tensor in rows]
    scores = sharded.score(*mine)[0] - plain.score(*mine)[0]
    whole_one = gradients(plain, rows, world, 1)
    masters = {name: (p.dtype, is_sharded(p)) for name, p in sharded.causal_lm.named_parameters()}
    return {
        "difference": worst(whole_one, gradients(sharded, mine, world, world.size)),
        "scores": scores.abs().max().item(),
        "all sharded": all(sharded for _, sharded in masters.values()),
        "dtypes": sorted({f"{d!s} {trainable.covers(n)}" for n, (d, _) in masters.items()}),
        "gradient dtypes": sorted({str(p.grad.dtype) for _, p in sharded.trainable_parameters()}),
    }


def round_trip(base: Path, out: Path, world: World) -> dict:
    """Weights and optimizer state written by all ranks in many files, read by an unsharded and a sharded model."""
    tensor_files.MAX_FILE_BYTES = 20_000
    how = (with_nope(read_model_config(base), LAYERS, None, str(base)), Trainable.of("all"), "fp32", "auto")
    first = load_in_place(base, *how, world)
    optimizer = build_optimizer(first.trainable_parameters(), Options(learning_rate=1e-3))
    first(*rows_of(first, 2)).backward()
    optimizer.step()
    state = {"model": model_tensors(first.causal_lm), "optimizer": optimizer_tensors(optimizer)}
    write_checkpoint(out / "checkpoint-1", state, {}, {"step": 1}, world)
    Checkpoint(out / "checkpoint-1", 1).verify()
    found = {"files": len(list((out / "checkpoint-1").glob("*.safetensors")))}
    for name, other in (("plain", load_for_training(base, *how)), ("sharded", load_in_place(base, *how, world))):
        restore_weights(other.causal_lm, TensorReader.of_model(out / "checkpoint-1"))
        copied = build_optimizer(other.trainable_parameters(), Options(learning_rate=1e-3))
        load_optimizer_tensors(copied, TensorReader.of_state(out / "checkpoint-1", "optimizer"))
        again = {"model": model_tensors(other.causal_lm), "optimizer": optimizer_tensors(copied)}
        found[name] = all(
            torch.equal(full_tensor(tensor), full_tensor(again[kind][key]))
            for kind in state
            for key, tensor in state[kind].items()
        )
    return found


def flagged_updates(base: Path, world: World) -> dict:
    """Updates of shards under the device's flag, as on GPUs: a finite step is the same as without one, and of one
    that is not finite on rank 1 alone nothing reaches weights or moments of any rank."""
    how = (with_nope(read_model_config(base), LAYERS, None, str(base)), Trainable.of("all"), "fp32", "auto")
    states = []
    for flagged in (False, True):
        model = load_in_place(base, *how, world)
        optimizer = build_optimizer(model.trainable_parameters(), Options(learning_rate=1e-3))
        pending = PendingResults(world.device, lag=1)
        for poisoned in (False, True)[: 1 + flagged]:
            factor = float("inf") if poisoned and world.rank == 1 else 1.0
            loss = model(*rows_of(model, 2)) * factor
            loss.backward()
            norm = ddp.clip_gradients([p for _, p in model.trainable_parameters()], 1.0)
            pending.put("", loss.detach(), norm, stop=False)
            if flagged:
                optimizer.found_inf = pending.failed
            optimizer.step()
            optimizer.zero_grad()
        states.append({**model_tensors(model.causal_lm), **optimizer_tensors(optimizer)})
    return {"same": same_tensors(*states), "seen": not pending.take()[-1][1].loss < float("inf")}


def canary(base: Path, directory: Path, world: World) -> list[str]:
    """The results of a start from a model with a canary, and on each rank of a start from one with edited weights."""
    config = with_nope(read_model_config(base), LAYERS, None, str(base))

    def copy() -> None:
        shutil.copytree(base, directory)
        write_config(config, directory)
        write_canary(load_causal_lm(directory), directory)

    def edit() -> None:
        weights = load_file(directory / "model.safetensors")
        weights["model.norm.weight"] *= 2
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    how = (config, Trainable.of("all"), "fp32", "auto")
    process_group.run_on_main_rank(world, copy)
    load_in_place(directory, *how, world)
    process_group.run_on_main_rank(world, edit)
    with pytest.raises(CheckpointError) as caught:
        load_in_place(directory, *how, world)
    said = "is not the model of its nope_canary.json"
    return [
        "loaded",
        *process_group.run_on_all_ranks(world, lambda: said if said in str(caught.value) else str(caught.value)),
    ]


def length_curves(base: Path, world: World) -> list[list[list[dict]]]:
    """Curves of a sharded and of an unsharded model: over seven batches, so that of two ranks the last has one fewer,
    and over a single batch, so that it has none."""
    how = (with_nope(read_model_config(base), LAYERS, None, str(base)), Trainable.of("all"), "fp32", "auto")
    models = load_in_place(base, *how, world), load_for_training(base, *how)
    return [
        [LengthCurve(model, documents(count, 64), lengths, batch_tokens=64, world=world)() for model in models]
        for count, lengths in ((5, [16, 64]), (1, [64]))
    ]


def documents(count: int, num_tokens: int) -> PackedRows:
    """Random documents of this many tokens, the same on every rank; token 0 ends each."""
    tokens = np.random.default_rng(0).integers(1, 300, (count, num_tokens + 1)).astype(np.uint16)
    tokens[:, -1] = 0
    offsets = np.arange(count + 1) * (num_tokens + 1)
    cache = SimpleNamespace(tokens=tokens.ravel(), offsets=offsets, end_of_text_id=0)
    return PackedRows(cache, np.arange(count), 32, "document", keep_last=True)


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(full_tensor(one[k]), full_tensor(other[k])) for k in one)


def main() -> None:
    tied, untied, out = map(Path, sys.argv[1:])
    world = process_group.start(use_cuda=False, timeout_sec=120)
    found = {
        f"{base.name}: {case}": compare(base, case, world)
        for base, case in [*((tied, case) for case in CASES), (untied, "everything"), (untied, "NoPE layers")]
    }
    found["flagged updates"] = flagged_updates(untied, world)
    found["length curves"] = length_curves(tied, world)
    found["canary"] = canary(tied, out.with_name("with canary"), world)
    found["round trip"] = round_trip(untied, out.parent, world)
    if world.is_main:
        out.write_text(json.dumps(found))
    process_group.stop()
    process_group.end_process(0)


if __name__ == "__main__":
    main()
