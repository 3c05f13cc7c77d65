"""Writes the metrics of training: training.log, TensorBoard and logs/metrics.jsonl. Only rank 0 has a writer."""

import contextlib
import json
import math
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from flare.files import write_text
from flare.logs import log
from flare.run.experiment import Experiment
from flare.run.metrics_file import base_loss
from flare.terminal import columns
from flare.train.tensorboard import TensorBoardWriter

MIN_DATA_WAIT = 0.02
"""The log line shows the share of time spent waiting for data if it is at least this."""


def perplexity(loss: float) -> float:
    """exp(loss), at most exp(709), near the largest float: JSON has no infinity."""
    return math.exp(min(loss, 709.0))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def share_of(peak_flops: float | None, tokens_per_sec: float, flops_per_token: float | None) -> float | None:
    """The share of the peak FLOP/s that a rate uses. None when the peak or the FLOPs per token are unknown."""
    return tokens_per_sec * flops_per_token / peak_flops if peak_flops and flops_per_token else None


class Throughput:
    """Tokens per second of training, without evaluation and saving. Padding does not count."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._t0: float | None = None

    def start(self) -> None:
        """Start the clock."""
        self._t0 = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock, if it runs."""
        if self._t0 is not None:
            self.seconds += time.perf_counter() - self._t0
            self._t0 = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for a block, such as an evaluation."""
        self.stop()
        yield
        self.start()

    def add(self, tokens: int) -> None:
        """Count trained tokens."""
        self.tokens += tokens

    def take(self) -> float:
        """The rate since the last call."""
        rate = self.tokens / self.seconds if self.seconds > 0 else 0.0
        self.tokens, self.seconds = 0, 0.0
        return rate


class MetricsWriter:
    """Writes one stage's records.

    Args:
        history: records up to the step to resume from. Later records of a killed run are dropped.
    """

    def __init__(self, experiment: Experiment, stage: int, max_steps: int, history: list[dict]) -> None:
        self.experiment = experiment
        self.stage = stage
        self.max_steps = max_steps
        self.warned_of: set[str] = set()
        step = history[-1]["step"] if history else 0
        self._restore_jsonl(history)
        self.tensorboard: TensorBoardWriter | None = None
        with self._warn_if_unwritable("TensorBoard's files"):
            self.tensorboard = TensorBoardWriter(experiment, stage, history)
        self.bar = tqdm(
            total=max_steps, initial=step, unit="step", desc=f"stage {stage}", disable=None, ncols=columns(sys.stderr)
        )  # fmt: skip

    def _restore_jsonl(self, history: list[dict]) -> None:
        """Keep the lines of other stages, and of this stage the records in the checkpoint."""
        path = self.experiment.logs / "metrics.jsonl"
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # a line cut off by a crash
                    continue
                if record.get("stage") != self.stage:
                    kept.append(line)
        kept += [json.dumps({"stage": self.stage, **record}) for record in history]
        write_text(path, "".join(line + "\n" for line in kept))
        self.jsonl = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the writer

    @contextlib.contextmanager
    def _warn_if_unwritable(self, what: str) -> Iterator[None]:
        """If a log cannot be written, warn once and continue the run."""
        try:
            yield
        except OSError as error:
            if what not in self.warned_of:
                log.warning(f"cannot write {what}: {error}")
            self.warned_of.add(what)

    def describe(self, settings: dict[str, str | float], plan: Sequence[str]) -> None:
        """Write the settings and the plan of this stage to TensorBoard."""
        with self._warn_if_unwritable("TensorBoard's files"):
            if self.tensorboard:
                self.tensorboard.describe(settings, plan)

    def record(self, record: dict) -> None:
        """Write a step's or an evaluation's numbers to all logs. Raises: EnvError when the directory was removed."""
        self.experiment.check_not_removed()
        with self._warn_if_unwritable("metrics"):
            self.jsonl.write(json.dumps({"stage": self.stage, **record}) + "\n")
            self.jsonl.flush()
            if self.tensorboard:
                self.tensorboard.record(record)
        log.info(format_record(record, self.max_steps))

    def advance(self, loss: float, learning_rate: float) -> None:
        """Move the progress bar by a step."""
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{learning_rate:.2e}", refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Flush and close all files."""
        self.bar.close()
        for file in (self.tensorboard, self.jsonl):
            with contextlib.suppress(OSError):  # an unwritable log must not hide another error
                if file:
                    file.close()


def format_record(record: dict, max_steps: int) -> str:
    """The line in training.log. It shows the wait for data from ``MIN_DATA_WAIT`` of the time on."""
    where = f"step {record['step']}/{max_steps}"
    if "eval_loss" in record:
        best = " | best so far" if record.get("is_best") else ""
        curve = record.get("eval_context_lengths", ())
        best += "".join(f" | at {row['context_length']}: {row['loss']:.4f}" for row in curve)
        return (
            f"{where} | epoch {record['epoch']:.2f} | eval loss {record['eval_loss']:.4f} | perplexity "
            f"{record['eval_perplexity']:.4g} | token accuracy {record['eval_token_accuracy']:.2%}{best}"
        )
    mfu = ""
    if record.get("mfu") is not None:
        mfu = f" | MFU {record['mfu']:.1%} (executed {record['executed_flops_use']:.1%})"
    scale = f" | loss scale {record['loss_scale']:g}" if "loss_scale" in record else ""
    norm = "overflow" if record["grad_norm"] is None else f"{record['grad_norm']:.3g}"
    waited = f" | data wait {record['data_wait']:.0%}" if record.get("data_wait", 0) >= MIN_DATA_WAIT else ""
    return (
        f"{where} | loss {record['loss']:.4f} | lr {record['learning_rate']:.2e} | grad {norm} | "
        f"{record['tokens_per_sec']:,.0f} tokens/s{mfu}{scale}{waited} | memory {record['memory_gib']:.1f} GiB"
    )


LABEL_WIDTH = 16


def summary_lines(experiment: Experiment, stage: int, history: list[dict], tokens: int) -> list[str]:
    """Results, and what to do next. Args: tokens: trained in this stage."""
    rows = _rows(experiment, stage, history, tokens)
    return [f"{label:<{LABEL_WIDTH}}{text}" for label, text in rows]


def _rows(experiment: Experiment, stage: int, history: list[dict], tokens: int) -> Iterator[tuple[str, str]]:
    rates = [record["tokens_per_sec"] for record in history if record.get("tokens_per_sec")]
    speed = f", {sum(rates) / len(rates):,.0f} tokens/s" if rates else ""
    yield f"stage {stage}", f"{tokens:,} tokens{speed}"
    losses = [record["eval_loss"] for record in history if "eval_loss" in record]
    if losses:
        yield "held-out loss", f"{losses[0]:.4f} at the start, {losses[-1]:.4f} at the end"
    base = base_loss(history)
    if base is not None:
        yield "the base's", f"{base:.4f}: the same weights with RoPE everywhere, untrained"
    model, board = (shlex.quote(str(path)) for path in (experiment.final_model, experiment.tensorboard))
    yield "final model", model
    yield "curves", f"tensorboard --logdir {board}"
    yield (
        "evaluate",
        "python evaluate_model_enhanced.py \\",
    )  # two lines: a terminal folds long ones
    yield "", f"    --model_path {model}"
