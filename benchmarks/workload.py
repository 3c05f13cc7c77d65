"""One training run of random rows through a model with random weights, by Flare's trainer or by HF Trainer.

    python -m benchmarks.workload '{"trainer": "flare", ...}'

Each measurement has its own process, so that its peak memory can be measured. The same weights, rows and
updates on both sides: rows of random tokens joined as ``run_clm`` joins them (``concat``: no document bounds).
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from flare.data.order import RowOrder
from flare.data.training_rows import Batch, TrainRows
from flare.files import REPO
from flare.plan.model_shape import ModelShape

if TYPE_CHECKING:
    from flare.distributed.process_group import World
    from flare.model.training_model import TrainingModel


@dataclass(frozen=True)
class Workload:
    """One run. ``trainer`` is flare or hf; ``shape`` a config.json; ``device`` cpu or cuda."""

    trainer: str
    shape: dict
    stage: int
    nope_layers: list[int]
    batch_size: int
    seq_len: int
    steps: int
    warmup_steps: int = 2
    device: str = "cpu"
    precision: str = "fp32"
    gradient_checkpointing: bool | str = False  # Flare's: selective, too
    attn_implementation: str = "sdpa"  # for Flare also varlen and flash_attention_2, its own kernels
    compile: bool = False  # Flare's --compile; HF Trainer has torch_compile in hf_options
    processes: int = 1  # CPU ranks of Flare, which share the rows of a step
    hf_options: dict = field(default_factory=dict)  # more TrainingArguments, for HF Trainer only


@dataclass
class Measured:
    """Of one run: seconds of each step after warm-up, the first losses, and the peak of its memory."""

    step_seconds: list[float]
    losses: list[float]
    peak_bytes: int
    idle_bytes: int  # on the CPU: resident before the model was made, the interpreter with its libraries
    tokens_per_step: int

    @property
    def tokens_per_sec(self) -> float:
        return self.tokens_per_step / median(self.step_seconds)


class RandomRows(TrainRows):
    """Rows of random tokens."""

    def __init__(self, num_rows: int, seq_len: int, vocab_size: int) -> None:
        generator = np.random.default_rng(0)
        self.tokens = generator.integers(0, vocab_size, (num_rows, seq_len + 1), dtype=np.int64)
        self.seq_len = seq_len

    def __len__(self) -> int:
        return len(self.tokens)

    def order(self, seed: int) -> RowOrder:
        return RowOrder(seed, len(self.tokens))

    def epochs(self, position: int) -> float:
        return position / len(self.tokens)

    def num_targets(self, rows: np.ndarray) -> int:
        return len(rows) * self.seq_len

    def batch(self, rows: np.ndarray) -> Batch:
        tokens = self.tokens[rows]
        return Batch(tokens[:, :-1], tokens[:, 1:], np.tile(np.arange(self.seq_len), (len(rows), 1)))


def measure(workload: Workload, limit_sec: float | None = None) -> Measured:
    """Run it in a fresh process.

    Raises: RuntimeError with the last line that it wrote, when it fails, or when it takes longer than ``limit_sec``.
    """
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workload.processes}"]
    launcher = start if workload.processes > 1 else []
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "benchmarks.workload", json.dumps(asdict(workload))]
    try:
        result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=limit_sec)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no result within {limit_sec:.0f} s") from error
    if result.returncode:
        raise RuntimeError(last_error(result.stderr) or f"exit code {result.returncode}")
    return Measured(**json.loads(result.stdout.splitlines()[-1]))


def last_error(text: str) -> str:
    """The line of a traceback that says what went wrong: the last one, or the last that names an exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or [""])[-1]


def random_model(workload: Workload) -> object:
    """A causal LM with random weights on the device, patched, frozen and with dtypes as Flare trains it."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

    from flare.model.training_model import set_trainable
    from flare.nope.patch import patch_qwen_rope
    from flare.plan.trainable import Trainable

    shape = ModelShape.from_config(workload.shape)
    torch.manual_seed(0)
    config_class = Qwen2Config if shape.family == "qwen2" else Qwen3Config
    config = config_class(**{k: v for k, v in workload.shape.items() if k != "model_type"}, dtype="float32")
    with torch.device(workload.device):
        attention = "sdpa" if workload.trainer == "flare" else workload.attn_implementation
        causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if workload.nope_layers:
        patch_qwen_rope(causal_lm, workload.nope_layers)
    trainable = Trainable.of("all" if workload.stage == 2 else workload.nope_layers)
    # HF Trainer keeps every weight in fp32 and casts under autocast: frozen ones in bf16 are Flare's own.
    set_trainable(causal_lm, trainable, workload.precision if workload.trainer == "flare" else "fp32")
    return causal_lm.train()


def train_flare(
    model: "TrainingModel", workload: Workload, rows: RandomRows, world: "World", counts: Sequence[int]
) -> list[dict]:
    """Train with Flare's own trainer; ``counts`` are the rows of each rank in a step. Returns: its history."""
    from benchmarks.bare_trainer import bare_trainer
    from flare.config.options import Options

    options = Options(
        stage=workload.stage, learning_rate=1e-5, max_steps=workload.steps, max_seq_length=workload.seq_len,
        per_device_train_batch_size=max(workload.batch_size // workload.processes, 1), lr_scheduler_type="constant",
        logging_steps=1, eval_steps=None, save_steps=10**9, seed=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        trainer = bare_trainer(model, rows, options, world, counts, Path(scratch))
        trainer.train()
    return trainer.train_state.history


def run_flare(workload: Workload) -> tuple[list[float], list[float]]:
    """(seconds of each step, losses) of Flare's own trainer."""
    import torch

    from flare.distributed import process_group
    from flare.distributed.process_group import World
    from flare.model.patches import apply_patches
    from flare.model.training_model import HALF_DTYPES, TrainingModel
    from flare.plan.balance import equal_balance

    model = TrainingModel(random_model(workload), HALF_DTYPES.get(workload.precision), documents=False)
    apply_patches(model, workload.attn_implementation, workload.gradient_checkpointing, workload.compile)
    rows = RandomRows(workload.steps * workload.batch_size, workload.seq_len, workload.shape["vocab_size"])
    world = World(0, 0, 1, torch.device(workload.device, 0) if workload.device == "cuda" else torch.device("cpu"))
    if workload.processes > 1:
        world = process_group.start(use_cuda=False, timeout_sec=600)
    history = train_flare(model, workload, rows, world, equal_balance(workload.batch_size, world.size).rows)
    process_group.stop()
    tokens = workload.batch_size * workload.seq_len
    return [tokens / r["tokens_per_sec"] for r in history], [r["loss"] for r in history]


def run_hf(workload: Workload) -> tuple[list[float], list[float]]:
    """(seconds of each step, losses) of transformers' Trainer, set up as run_clm does."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

    causal_lm = random_model(workload)
    seconds, losses = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.t0 = time.perf_counter()

        def on_log(self, *args: object, logs: dict, **kwargs: object) -> None:
            # Called after the step's loss was read, so that all of the step has run on the device.
            if "loss" in logs:
                seconds.append(time.perf_counter() - self.t0)
                losses.append(logs["loss"])

    rows = RandomRows(workload.steps * workload.batch_size, workload.seq_len, workload.shape["vocab_size"])
    # run_clm's rows: labels are the inputs, and the model shifts them (one target less a row than Flare has).
    examples = [{"input_ids": torch.from_numpy(r), "labels": torch.from_numpy(r)} for r in rows.tokens[:, :-1]]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, per_device_train_batch_size=workload.batch_size, max_steps=workload.steps,
            learning_rate=1e-5, lr_scheduler_type="constant", logging_steps=1, logging_strategy="steps",
            save_strategy="no", report_to=[], disable_tqdm=True, seed=0, data_seed=0, weight_decay=0.0,
            use_cpu=workload.device == "cpu", bf16=workload.precision == "bf16",
            gradient_checkpointing=workload.gradient_checkpointing, **workload.hf_options,
        )  # fmt: skip
        trainer = Trainer(
            model=causal_lm, args=arguments, train_dataset=examples, data_collator=default_data_collator,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return seconds, losses


def main() -> int:
    workload = Workload(**json.loads(sys.argv[1]))
    import torch
    import transformers
    import transformers.trainer  # both sides carry the same libraries, so that memory compares

    transformers.logging.set_verbosity_error()
    runners = {"flare": run_flare, "hf": run_hf}
    idle = resident_peak_bytes()
    seconds, losses = runners[workload.trainer](workload)
    peak = torch.cuda.max_memory_allocated() if workload.device == "cuda" else resident_peak_bytes()
    tokens = workload.batch_size * workload.seq_len
    measured = Measured(seconds[workload.warmup_steps :], losses, peak, idle, tokens)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(asdict(measured)))
    return 0


def resident_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


if __name__ == "__main__":
    sys.exit(main())
