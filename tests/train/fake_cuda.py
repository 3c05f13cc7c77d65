"""Run by test_fake_cuda.py in a separate process: training steps on fake CUDA tensors, which have shapes,
dtypes and devices but no numbers.

usage: LD_PRELOAD=fake_cuda.so fake_cuda.py OUT    (torch looks up its CUDA part once, when it is imported)

Any operation on tensors of two devices raises, and so does whatever would make the host wait for a number of the
device (``.item()``, ``.tolist()``, a truth value). What kernels do inside is not run.
"""

import contextlib
import json
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bare_trainer import bare_trainer
from flare.config.options import Options
from flare.data.order import RowOrder
from flare.data.training_rows import Batch, TrainRows
from flare.distributed import ddp
from flare.distributed.process_group import World
from flare.model.linear_cross_entropy import linear_cross_entropy_sum
from flare.model.patches import apply_patches
from flare.model.training_model import HALF_DTYPES, TrainingModel, set_trainable
from flare.nope import modeling_nope
from flare.plan.inputs import PlanInputs
from flare.plan.memory import loss_bytes, memory
from flare.plan.model_shape import ModelShape, known_shape
from flare.plan.optimizer_state import ADAM_STATE_BYTES
from flare.plan.trainable import Trainable
from flare.train import trainer as trainer_module
from flare.train.trainer import Trainer

GPU = torch.device("cuda", 0)
TINY = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True,
}  # fmt: skip
CASES = {  # family, stage, kernel, packing, checkpointing, precision unless bf16
    "qwen2, stage 1, varlen, documents": ("qwen2", 1, "varlen", "document", False),
    "qwen2, stage 1, varlen, concat, checkpointing": ("qwen2", 1, "varlen", "concat", True),
    "qwen2, stage 2, varlen, documents, checkpointing": ("qwen2", 2, "varlen", "document", True),
    "qwen2, stage 2, sdpa, documents": ("qwen2", 2, "sdpa", "document", False),
    "qwen3, stage 1, sdpa, concat": ("qwen3", 1, "sdpa", "concat", False),
    "qwen3, stage 1, sdpa, documents, checkpointing": ("qwen3", 1, "sdpa", "document", True),
    "qwen3, stage 2, varlen, documents": ("qwen3", 2, "varlen", "document", False),
    "qwen3, stage 2, varlen, concat, checkpointing": ("qwen3", 2, "varlen", "concat", True),
    "qwen2, stage 1, sdpa, documents, fp16": ("qwen2", 1, "sdpa", "document", False, "fp16"),
    "qwen3, stage 2, sdpa, concat, checkpointing, fp16": ("qwen3", 2, "sdpa", "concat", True, "fp16"),
}
MODE = FakeTensorMode(allow_non_fake_inputs=True)


class Rows(TrainRows):
    """Random tokens, two documents a row."""

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        self.seq_len, self.vocab_size = seq_len, vocab_size

    def __len__(self) -> int:
        return 4

    def order(self, seed: int) -> RowOrder:
        return RowOrder(seed, len(self))

    def epochs(self, position: int) -> float:
        return position / len(self)

    def num_targets(self, rows: np.ndarray) -> int:
        return len(rows) * self.seq_len

    def batch(self, rows: np.ndarray) -> Batch:
        tokens = np.random.default_rng(0).integers(0, self.vocab_size, (len(rows), self.seq_len + 1))
        positions = np.tile(np.arange(self.seq_len) % (self.seq_len // 2), (len(rows), 1))
        return Batch(tokens[:, :-1], tokens[:, 1:], positions)


class Event:
    """Replaces torch.cuda.Event, which needs a driver."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def storages(tensors: object) -> Iterator[torch.UntypedStorage]:
    """Storages of those tensors that are on the GPU."""
    for tensor in torch.utils._pytree.tree_leaves(tensors):
        if isinstance(tensor, torch.Tensor) and tensor.device == GPU:
            yield tensor.untyped_storage()


class LivingBytes(TorchDispatchMode):
    """Counts the bytes of living GPU tensors that operations make, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = list(storages((args, kwargs)))
        self.known.update(given)  # a view of an earlier tensor is not new
        made = operation(*args, **(kwargs or {}))
        for storage in storages(made):
            self._see(storage)
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.alive -= size


def on_gpu(module: torch.nn.Module) -> torch.nn.Module:
    """Replace a module's meta tensors by fake GPU tensors; a shared weight stays shared."""
    made: dict[int, torch.Tensor] = {}
    with MODE:
        for owner in module.modules():
            for held in (owner._parameters, owner._buffers):
                for name, tensor in held.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)
                        if isinstance(tensor, torch.nn.Parameter):
                            made[id(tensor)] = torch.nn.Parameter(made[id(tensor)])
                    held[name] = made[id(tensor)]
    return module


def trainer_of(
    config: dict,
    nope: list[int],
    stage: int,
    kernel: str,
    packing: str,
    checkpointing: bool,
    micro: int,
    seq_len: int,
    precision: str = "bf16",
) -> Trainer:
    """A trainer as the session makes it, on one GPU."""
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3"}[config["model_type"]]
    settings = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    config_class = getattr(modeling_nope, f"{name}NopeConfig")
    with torch.device("meta"):
        causal_lm = getattr(modeling_nope, f"{name}NopeForCausalLM")._from_config(
            config_class(**settings, nope_layers=nope), attn_implementation="sdpa"
        )
    on_gpu(causal_lm)
    with MODE:
        set_trainable(causal_lm, Trainable.of("all" if stage == 2 else nope), precision)
    causal_lm.train()
    model = TrainingModel(causal_lm, HALF_DTYPES[precision], documents=packing == "document")
    apply_patches(model, kernel, checkpointing)
    options = Options(
        stage=stage, learning_rate=1e-5, max_steps=9, max_seq_length=seq_len, per_device_train_batch_size=micro,
        lr_scheduler_type="constant", eval_steps=None, save_steps=10**9, packing=packing,
    )  # fmt: skip
    rows = Rows(seq_len, config["vocab_size"])
    with MODE:
        no_stop = Path(tempfile.gettempdir()) / "no-stop"
        trainer = bare_trainer(model, rows, options, World(0, 0, 1, GPU), [2 * micro], no_stop)
    trainer.pending.take = lambda keep=0: []  # the only place where the host reads numbers
    return trainer


def tiny(family: str, stage: int, kernel: str, packing: str, checkpointing: bool, precision: str = "bf16") -> Trainer:
    return trainer_of(TINY | {"model_type": family}, [1], stage, kernel, packing, checkpointing, 2, 64, precision)


def outcome(steps: int, trainer: Trainer) -> str:
    """The result of some steps: fine, or the error."""
    try:
        with MODE:
            for _ in range(steps):
                trainer._step()
            batch = trainer.loader.take(trainer.train_state.rows).batches[0]
            trainer.components.model.score(**trainer_module.to_device(batch, GPU))
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    places = {t.device for state in trainer.components.optimizer.state.values() for t in state.values()}
    return "fine" if places == {GPU} and trainer.pending.lag == 1 else f"{places}, lag {trainer.pending.lag}"


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


def planted(case: str) -> dict[str, str]:
    """The results of two mistakes: labels left on the host, and a number read in mid-step."""
    moved, reduce = trainer_module.to_device, ddp.clip_gradients

    def labels_stay(tensors: dict, device: torch.device) -> dict:
        return moved(tensors, device) | {"labels": tensors["labels"]}

    def asks(parameters: list, max_norm: float) -> torch.Tensor:
        norm = reduce(parameters, max_norm)
        return norm.new_tensor(norm.item())

    with replaced(trainer_module, "to_device", labels_stay):
        mixed = outcome(1, tiny(*CASES[case]))
    with replaced(ddp, "clip_gradients", asks):
        waits = outcome(1, tiny(*CASES[case]))
    return {"labels on the host": mixed, "a number in mid-step": waits}


def loss_peaks(head_trains: bool, half_dtype: torch.dtype) -> list[int]:
    """[peak bytes of the loss of 4096 tokens, the plan's number], with Qwen's vocabulary."""
    shape = known_shape("Qwen/Qwen2.5-0.5B")
    plan = PlanInputs(shape, 2, (1,), seq_len=4096, gpus=(("GPU", 81559),)).microbatch
    with MODE:
        hidden = torch.empty(4096, shape.hidden_size, dtype=half_dtype, device=GPU, requires_grad=True) + 0
        dtype = torch.float32 if head_trains else half_dtype
        weight = torch.empty(shape.vocab_size, shape.hidden_size, dtype=dtype, device=GPU, requires_grad=head_trains)
        labels = torch.empty(4096, dtype=torch.int64, device=GPU)
        with LivingBytes() as living:
            linear_cross_entropy_sum(hidden, weight, labels)
    return [living.peak, loss_bytes(shape, replace(plan, fp16=half_dtype == torch.float16), head_trains, on_gpu=True)]


def step_peaks(model: str, layers: int, stage: int, checkpointing: bool) -> list[int]:
    """[peak bytes of a step without weights and moments, the plan's number], with rows of 4096 and varlen."""
    config = known_shape(model).to_config() | {"num_hidden_layers": layers}
    shape, nope = ModelShape.from_config(config), [layers - 2, layers - 1]
    trainer = trainer_of(config, nope, stage, "varlen", "document", checkpointing, 2, 4096)
    with MODE:
        trainer._step()
        with LivingBytes() as living:
            trainer._step()
    inputs = PlanInputs(
        shape, stage, tuple(nope), seq_len=4096, per_device_batch=2, accumulation=2, document_mask=False,
        gradient_checkpointing=checkpointing, gpus=(("GPU", 81559),), attn_implementation="varlen",
    )  # fmt: skip
    need = memory(inputs)
    resident = need.weights + ADAM_STATE_BYTES * inputs.resolved_trainable.params(shape)
    return [living.peak, need.peak_bytes - resident]


def main() -> None:
    torch.cuda.Event = Event
    torch.cuda.set_device = lambda device: None
    torch.cuda.is_bf16_supported = lambda *_: True  # autocast calls it
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    found = {
        "torch": [str(torch.accelerator.current_accelerator()), torch.cuda.is_available()],
        "cases": {case: outcome(2, tiny(*how)) for case, how in CASES.items()},
        "planted": planted(next(iter(CASES))),
        "loss": {
            f"{precision}, head trains: {trains}": loss_peaks(trains, dtype)
            for trains in (False, True)
            for precision, dtype in HALF_DTYPES.items()
        },
        "step": {
            f"{model}, stage {stage}{', checkpointing' * recompute}": step_peaks(model, 6, stage, recompute)
            for model, stage, recompute in (
                ("Qwen/Qwen2.5-3B", 1, False), ("Qwen/Qwen2.5-7B", 2, True), ("Qwen/Qwen3-4B", 2, False),
            )
        },
    }  # fmt: skip
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
