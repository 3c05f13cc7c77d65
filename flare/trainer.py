"""The loop: rows -> micro-batches -> clip -> update -> log -> evaluate -> save.

The loss of a step is the sum of token losses over the whole global batch divided by its number of targets,
so that loss and gradients do not depend on how the rows are spread over processes and micro-batches.
"""

import functools
import math
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from flare import distributed
from flare.data.order import equal_rounds, micro_batches, shares
from flare.data.packing import Batch, PackedRows
from flare.distributed import World
from flare.errors import FlareError
from flare.loss import IGNORE_INDEX
from flare.metrics import MetricsWriter, Throughput, peak_memory_gib, perplexity
from flare.model import TrainingModel
from flare.optim import set_learning_rate
from flare.options import Options
from flare.sharding import is_sharded

STOP_FILE = "STOP"


@dataclass
class Progress:
    """Where a run is: all that a checkpoint must know besides weights and optimizer."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    history: list[dict] = field(default_factory=list)

    def as_dict(self) -> dict:
        return asdict(self)

    def out_of_patience(self, options: Options) -> bool:
        """Whether early stopping ends the run here."""
        patience = options.early_stopping_patience
        return patience is not None and self.evaluations_without_gain >= patience

    def forget_best(self) -> None:
        """Begin anew to look for the best evaluation."""
        self.best_loss, self.best_step, self.evaluations_without_gain = None, None, 0


class StopRequest:
    """Signals that ask for a clean stop. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name


@dataclass
class Parts:
    """What a trainer is made of."""

    model: TrainingModel
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    train_rows: PackedRows
    eval_rows: PackedRows
    max_steps: int
    global_batch_size: int
    flops_per_token: float | None = None
    peak_flops: float | None = None
    more_evaluation: Callable[[int, Callable[[], float]], dict] | None = None
    """What an evaluation records besides the loss, given the step and the way to get the loss. A collective."""


class Trainer:
    """Trains one stage.

    Args:
        save: called with the progress on every rank when a checkpoint is due.
        stop_dir: the directory in which a file ``STOP`` asks for a clean stop.
        metrics: on rank 0 only.
    """

    def __init__(
        self,
        parts: Parts,
        options: Options,
        world: World,
        progress: Progress,
        save: Callable[[Progress], None],
        stop_dir: Path,
        metrics: MetricsWriter | None = None,
    ) -> None:
        self.parts = parts
        self.options = options
        self.world = world
        self.progress = progress
        self.save = save
        self.stop_dir = stop_dir
        self.metrics = metrics
        self.module = distributed.wrap_ddp(parts.model, world)
        self.parameters = [p for _, p in parts.model.trainable_parameters()]
        self.order = parts.train_rows.order(options.seed)
        self.counts = shares(parts.global_batch_size, [1.0] * world.size)
        self.first_row = sum(self.counts[: world.rank])
        self.last_row = self.first_row + self.counts[world.rank]
        self.throughput = Throughput()
        self.stop_request = StopRequest()
        self.saved_step = progress.step
        self.window_losses: list[float] = []

    def train(self) -> str:
        """Run to the end, an early stop or a request to stop; returns finished, early_stopped or stopped."""
        progress, options = self.progress, self.options
        self.stop_request.install()
        if progress.step == 0 and options.eval_steps:
            self._evaluate()
        if progress.out_of_patience(options):
            return "early_stopped"
        while progress.step < self.parts.max_steps:
            self.throughput.start()
            loss, grad_norm, stop = self._step()
            self.throughput.stop(self.parts.global_batch_size * options.max_seq_length)
            self._after_step(loss, grad_norm)
            at_end = progress.step == self.parts.max_steps
            if options.eval_steps and (at_end or progress.step % options.eval_steps == 0):
                self._evaluate()
            if at_end or stop or progress.step % options.save_steps == 0:
                self._save()
            if stop:
                return "stopped"
            if progress.out_of_patience(options):
                self._save()
                return "early_stopped"
        return "finished"

    # -- one step ----------------------------------------------------------------------------------

    def _step(self) -> tuple[float, float, bool]:
        """One optimizer step; returns the global loss, the gradient norm and whether to stop after it."""
        parts, progress = self.parts, self.progress
        size = parts.global_batch_size
        rows = self.order.rows(progress.rows, progress.rows + size)
        num_targets = parts.train_rows.num_targets(rows)
        if num_targets == 0:
            raise FlareError(f"step {progress.step + 1} has no target token in its {size} rows")
        mine = rows[self.first_row : self.last_row]
        self.module.train()
        self._seed()
        # DDP averages over ranks; times their number it is the sum that the loss is defined by.
        scale = self.world.size / num_targets
        loss_sum = torch.zeros((), device=self.world.device)
        pieces = rank_pieces(parts.model, mine, self.counts, self.options)
        for index, piece in enumerate(pieces):
            batch = self._to_device(batch_of(parts.train_rows, piece))
            with distributed.reduce_gradients(self.module, now=index == len(pieces) - 1):
                nll_sum = self.module(**batch)
                (nll_sum * scale).backward()
            loss_sum += nll_sum.detach()
        max_norm = self.options.max_grad_norm or math.inf
        grad_norm = distributed.clip_gradients(self.parameters, max_norm).item()
        total, stop_votes = distributed.all_sum([loss_sum.item(), float(self._wants_stop())])
        loss = total / num_targets
        self._refuse_nonfinite(loss, grad_norm, rows)
        set_learning_rate(parts.optimizer, self._learning_rate())
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.rows += size
        progress.tokens += size * self.options.max_seq_length
        return loss, grad_norm, stop_votes > 0

    def _seed(self) -> None:
        """Random numbers are a function of seed, step and rank, so that a checkpoint needs no generator state."""
        torch.manual_seed((self.options.seed * 1_000_003 + self.progress.step) * 4096 + self.world.rank)

    def _learning_rate(self) -> float:
        return self.options.learning_rate * self.parts.schedule(self.progress.step)

    def _to_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        arrays = {"input_ids": batch.input_ids, "labels": batch.labels, "position_ids": batch.position_ids}
        return {k: torch.from_numpy(a).to(self.world.device, non_blocking=True) for k, a in arrays.items()}

    def _wants_stop(self) -> bool:
        return self.stop_request.signal_name is not None or (
            self.world.is_main and (self.stop_dir / STOP_FILE).exists()
        )

    def _refuse_nonfinite(self, loss: float, grad_norm: float, rows: np.ndarray) -> None:
        """Before the update, on all ranks alike: both numbers are the same everywhere."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        raise FlareError(
            f"step {self.progress.step + 1}: loss {loss} and gradient norm {grad_norm} are not finite (rows "
            f"{rows[:4].tolist()}...); the weights were not updated, the last checkpoint is good; lower "
            "--learning_rate or look at these rows"
        )

    def _after_step(self, loss: float, grad_norm: float) -> None:
        progress = self.progress
        self.window_losses.append(loss)
        learning_rate = self.options.learning_rate * self.parts.schedule(progress.step - 1)
        if self.metrics:
            self.metrics.advance(loss, learning_rate)
        if progress.step % self.options.logging_steps and progress.step != self.parts.max_steps:
            return
        window, self.window_losses = self.window_losses, []
        rate = self.throughput.take()
        mean = math.fsum(window) / len(window)
        record = self._place() | {
            "loss": mean,
            "perplexity": perplexity(mean),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_sec": rate,
            "mfu": self._mfu(rate),
            "memory_gib": distributed.all_max([peak_memory_gib(self.world.device)])[0],
        }
        self._record(record)

    def _mfu(self, tokens_per_sec: float) -> float | None:
        if not self.parts.peak_flops or not self.parts.flops_per_token:
            return None
        return tokens_per_sec * self.parts.flops_per_token / self.parts.peak_flops

    def _place(self) -> dict:
        progress = self.progress
        return {
            "step": progress.step,
            "epoch": self.parts.train_rows.epochs(progress.rows),
            "tokens": progress.tokens,
        }

    def _record(self, record: dict) -> None:
        self.progress.history.append(record)
        if self.metrics:
            self.metrics.record(record)

    # -- evaluation, saving, stopping ------------------------------------------------------------------

    def _evaluate(self) -> None:
        progress, options = self.progress, self.options
        score = functools.partial(evaluate_rows, self.parts, options, self.world)
        loss, accuracy = score()
        more = self.parts.more_evaluation(progress.step, lambda: score()[0]) if self.parts.more_evaluation else {}
        gain = progress.best_loss is None or loss < progress.best_loss - options.early_stopping_threshold
        if gain:
            progress.best_loss, progress.best_step = loss, progress.step
            progress.evaluations_without_gain = 0
        else:
            progress.evaluations_without_gain += 1
        self._record(
            self._place()
            | {
                "eval_loss": loss,
                "eval_perplexity": perplexity(loss),
                "eval_token_accuracy": accuracy,
                "is_best": gain,
            }
            | more
        )
        if gain and options.early_stopping_patience:
            self._save()  # the best weights must be there when patience runs out

    def _save(self) -> None:
        if self.saved_step == self.progress.step and self.progress.step > 0:
            return
        self.save(self.progress)
        self.saved_step = self.progress.step


def rank_pieces(model: TrainingModel, rows: np.ndarray, counts: list[int], options: Options) -> list[np.ndarray]:
    """A rank's rows (of ``counts`` on each) as micro-batches; as many on every rank where the model is sharded."""
    size = options.per_device_train_batch_size
    return equal_rounds(rows, counts, size) if is_sharded(model) else micro_batches(rows, size)


def batch_of(source: PackedRows, rows: np.ndarray) -> Batch:
    """These rows; for none of them the first one, without a target: it adds nothing to the loss."""
    if len(rows):
        return source.batch(rows)
    batch = source.batch(np.arange(1))
    batch.labels[:] = IGNORE_INDEX
    return batch


def evaluate_rows(parts: Parts, options: Options, world: World) -> tuple[float, float]:
    """(mean NLL in nats, share of targets that are the argmax) over the held-out rows, by all ranks together."""
    rows = np.arange(len(parts.eval_rows))[: options.max_eval_samples]
    counts = [len(rows[rank :: world.size]) for rank in range(world.size)]
    loss_sum = targets = hits = 0.0
    parts.model.eval()
    for piece in rank_pieces(parts.model, rows[world.rank :: world.size], counts, options):
        batch = batch_of(parts.eval_rows, piece)
        tensors = [torch.from_numpy(a).to(world.device) for a in (batch.input_ids, batch.labels, batch.position_ids)]
        losses, correct = parts.model.score(*tensors)
        loss_sum += losses.double().sum().item()
        hits += correct.sum().item()
        targets += int((tensors[1] >= 0).sum())
    loss_sum, hits, targets = distributed.all_sum([loss_sum, hits, targets])
    if not math.isfinite(loss_sum):
        raise FlareError("the evaluation loss is not finite; the last checkpoint is good")
    return loss_sum / targets, hits / targets
