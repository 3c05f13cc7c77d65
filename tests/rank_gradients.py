"""Run under torchrun: take one training step of a tiny model and write the gradients that AdamW saw.

usage: rank_gradients.py BASE CORPUS CACHE OUT MICRO GLOBAL ddp|fsdp
"""

import sys
from pathlib import Path

import torch

from flare import distributed
from flare.data.build import build_token_cache
from flare.data.packing import PackedRows, split_documents
from flare.data.rows import SourceSpec
from flare.data.sources import open_source
from flare.data.tokens import TokenSettings
from flare.hub import read_model_config
from flare.model import load_for_training, load_sharded
from flare.nope.format import with_nope
from flare.nope.load import load_tokenizer
from flare.optim import build_optimizer, build_schedule
from flare.options import Options
from flare.sharding import whole
from flare.trainable import Trainable
from flare.trainer import Parts, Progress, Trainer


def main() -> None:
    base, corpus, cache_dir, out, micro, size, parallel = sys.argv[1:]
    world = distributed.start(use_cuda=False, timeout_sec=60)
    how = (with_nope(read_model_config(Path(base)), [1, 3], None, base), Trainable(True), "fp32", "auto")
    model = load_sharded(Path(base), *how, world) if parallel == "fsdp" else load_for_training(Path(base), *how)
    source = open_source(SourceSpec(corpus), Path(cache_dir))
    cache = build_token_cache(source, load_tokenizer(Path(base)), Path(cache_dir), TokenSettings())
    rows = PackedRows(cache, split_documents(cache.hashes, 10)[0], 32, "document")
    options = Options(
        learning_rate=1e-3, per_device_train_batch_size=int(micro), max_steps=1, max_seq_length=32, max_grad_norm=0.0
    )
    parts = Parts(
        model=model,
        optimizer=build_optimizer(model.trainable_parameters(), options),
        schedule=build_schedule(options, 1),
        train_rows=rows,
        eval_rows=rows,
        max_steps=1,
        global_batch_size=int(size),
    )
    runner = Trainer(parts, options, world, Progress(), lambda progress: None, Path(out).parent)
    caught = {}
    parts.optimizer.register_step_pre_hook(
        lambda *_: caught.update({n: whole(p.grad).clone() for n, p in model.trainable_parameters()})
    )
    loss, _, _ = runner._step()
    if world.is_main:
        torch.save({"loss": loss, "gradients": caught}, out)
    distributed.stop()


if __name__ == "__main__":
    main()
