"""Run under torchrun: take one training step of a tiny model and write the gradients that AdamW saw.

usage: rank_gradients.py BASE CORPUS CACHE OUT MICRO GLOBAL ddp|fsdp [ROWS,ROWS,...]
"""

import sys
from pathlib import Path

import torch

from benchmarks.bare_trainer import bare_trainer
from flare.config.options import Options
from flare.data.packing import PackedRows
from flare.data.sources.base import SourceSpec
from flare.data.sources.open import open_source
from flare.data.token_cache.build import build_token_cache
from flare.data.token_cache.cache import TokenSettings
from flare.data.validation_split import split_documents
from flare.distributed import process_group
from flare.distributed.fsdp import full_tensor
from flare.hub import read_model_config
from flare.model.patches import apply_patches
from flare.model.training_model import load_for_training, load_in_place
from flare.nope.config_json import with_nope
from flare.nope.load import load_tokenizer
from flare.plan.balance import equal_balance
from flare.plan.trainable import Trainable
from flare.train.train_state import TrainState
from flare.train.trainer import Trainer


def make_trainer(
    base: Path,
    corpus: str,
    cache_dir: Path,
    scratch: Path,
    parallel: str = "ddp",
    precision: str = "fp32",
    train_state: TrainState | None = None,
    **changes: object,
) -> Trainer:
    """A trainer of a tiny model on this rank of the run that torchrun started."""
    world = process_group.start(use_cuda=False, timeout_sec=60)
    how = (with_nope(read_model_config(base), [1, 3], None, str(base)), Trainable(True), precision, "auto")
    model = load_in_place(base, *how, world) if parallel == "fsdp" else load_for_training(base, *how)
    apply_patches(model)
    cache = build_token_cache(
        open_source(SourceSpec(corpus), cache_dir), load_tokenizer(base), cache_dir, TokenSettings()
    )
    rows = PackedRows(cache, split_documents(cache.hashes, 10)[0], 32, "document")
    size = changes.pop("global_batch_size")
    rows_by_rank = changes.pop("rows_by_rank", None) or equal_balance(size, world.size).rows
    options = Options(**({"learning_rate": 1e-3, "max_seq_length": 32, "max_grad_norm": 0.0} | changes))
    return bare_trainer(model, rows, options, world, rows_by_rank, scratch, train_state)


def leave() -> None:
    """End the process group.

    A gloo thread may still have to drop the last reduced tensor, for which it needs the interpreter's lock; DDP's
    destructor, the last to hold the group, would wait for that thread with the lock held. So all ranks
    wait for each other once more.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    process_group.stop()


def main() -> None:
    base, corpus, cache_dir, out, micro, size, parallel, *shares = sys.argv[1:]
    batch = {"per_device_train_batch_size": int(micro), "global_batch_size": int(size)}
    batch |= {"rows_by_rank": [int(rows) for rows in shares[0].split(",")]} if shares else {}
    runner = make_trainer(Path(base), corpus, Path(cache_dir), Path(out).parent, parallel, max_steps=1, **batch)
    caught = {}
    runner.components.optimizer.register_step_pre_hook(
        lambda *_: caught.update(
            {n: full_tensor(p.grad).clone() for n, p in runner.components.model.trainable_parameters()}
        )
    )
    loss = runner._step().loss
    if runner.world.is_main:
        torch.save({"loss": loss, "gradients": caught}, out)
    leave()


if __name__ == "__main__":
    main()
