"""What is measured and where it goes: training.log, TensorBoard, logs/metrics.jsonl, training_metrics.json.

Rank 0 writes; on other ranks every method does nothing.
"""

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
from flare.train.tensorboard import Board

WORTH_A_WORD = 0.02
"""Share of the time spent waiting for data from which on the log line tells it."""


def perplexity(loss: float) -> float:
    """exp(loss), held at exp(709), near the largest float: JSON files hold no infinity."""
    return math.exp(min(loss, 709.0))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def share_of(peak_flops: float | None, tokens_per_sec: float, flops_per_token: float | None) -> float | None:
    """Of a device's peak FLOP/s, what a rate uses; None where either is unknown."""
    return tokens_per_sec * flops_per_token / peak_flops if peak_flops and flops_per_token else None


class Throughput:
    """Tokens per second of training itself: no evaluation or saving in the window, no padding counted."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._t0: float | None = None

    def start(self) -> None:
        """Let the clock run."""
        self._t0 = time.perf_counter()

    def stop(self) -> None:
        """Halt the clock, if it runs."""
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
        """Count tokens that were trained on."""
        self.tokens += tokens

    def take(self) -> float:
        """The rate since the last call."""
        rate = self.tokens / self.seconds if self.seconds > 0 else 0.0
        self.tokens, self.seconds = 0, 0.0
        return rate


class MetricsWriter:
    """Writes one stage's records.

    Args:
        history: records up to the step that training resumes from; later ones of a killed run are dropped.
    """

    def __init__(self, experiment: Experiment, stage: int, max_steps: int, history: list[dict]) -> None:
        self.experiment = experiment
        self.stage = stage
        self.max_steps = max_steps
        self.warned_of: set[str] = set()
        step = history[-1]["step"] if history else 0
        self._restore_jsonl(history)
        self.board: Board | None = None
        with self._worth_less_than_the_run("TensorBoard's files"):
            self.board = Board(experiment, stage, history)
        self.bar = tqdm(
            total=max_steps, initial=step, unit="step", desc=f"stage {stage}", disable=None, ncols=columns(sys.stderr)
        )  # fmt: skip

    def _restore_jsonl(self, history: list[dict]) -> None:
        """Keep other stages' lines; of this stage keep what the checkpoint knows."""
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
    def _worth_less_than_the_run(self, what: str) -> Iterator[None]:
        """A log that cannot be written is warned of, once."""
        try:
            yield
        except OSError as error:
            if what not in self.warned_of:
                log.warning(f"cannot write {what}: {error}")
            self.warned_of.add(what)

    def describe(self, settings: dict[str, str | float], plan: Sequence[str]) -> None:
        """What this stage runs with, for TensorBoard."""
        with self._worth_less_than_the_run("TensorBoard's files"):
            if self.board:
                self.board.describe(settings, plan)

    def record(self, record: dict) -> None:
        """Write one step's or evaluation's numbers everywhere. Raises: EnvError when the directory was removed."""
        self.experiment.check_not_removed()
        with self._worth_less_than_the_run("metrics"):
            self.jsonl.write(json.dumps({"stage": self.stage, **record}) + "\n")
            self.jsonl.flush()
            if self.board:
                self.board.record(record)
        log.info(format_record(record, self.max_steps))

    def advance(self, loss: float, learning_rate: float) -> None:
        """Move the progress bar by a step."""
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{learning_rate:.2e}", refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Flush and close all files."""
        self.bar.close()
        for file in (self.board, self.jsonl):
            with contextlib.suppress(OSError):  # a log that cannot be written hides no other error
                if file:
                    file.close()


def format_record(record: dict, max_steps: int) -> str:
    """The fixed line of training.log. Waiting for data is told from ``WORTH_A_WORD`` of the time on."""
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
    waited = f" | data wait {record['data_wait']:.0%}" if record.get("data_wait", 0) >= WORTH_A_WORD else ""
    return (
        f"{where} | loss {record['loss']:.4f} | lr {record['learning_rate']:.2e} | grad {norm} | "
        f"{record['tokens_per_sec']:,.0f} tokens/s{mfu}{scale}{waited} | memory {record['memory_gib']:.1f} GiB"
    )


LABEL_WIDTH = 16


def summary_lines(experiment: Experiment, stage: int, history: list[dict], tokens: int) -> list[str]:
    """Results, and what to do next. Args: tokens: trained on in this stage."""
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
    yield "evaluate", "python evaluate_model_enhanced.py \\"  # two lines: a path may be long, a terminal folds
    yield "", f"    --model_path {model}"
