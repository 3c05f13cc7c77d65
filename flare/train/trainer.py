"""The loop: rows -> micro-batches -> clip -> update -> log -> evaluate -> save.

The loss of a step is the sum of token losses over the whole global batch divided by its number of targets,
so that loss and gradients do not depend on how the rows are spread over processes and micro-batches.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from flare.config.options import Options
from flare.distributed import ddp, process_group
from flare.distributed.fsdp import is_sharded
from flare.distributed.process_group import World
from flare.errors import FlareError, during
from flare.logs import log
from flare.model.inputs import to_device
from flare.optim.loss_scale import RANGE_HINT, LossScale
from flare.optim.optimizer import can_skip_on_device, take_step
from flare.plan.balance import equal
from flare.train.components import Parts, evaluate_rows
from flare.train.garbage_collection import steady_collection
from flare.train.loader import StepLoader, StepRows
from flare.train.metrics import MetricsWriter, Throughput, peak_memory_gib, perplexity, share_of
from flare.train.step_results import Outcome, Outcomes, Place
from flare.train.stop import STOP_FILE, StopRequest
from flare.train.train_state import Progress


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
        self.module = ddp.wrap_ddp(parts.model, world)
        self.parameters = [p for _, p in parts.model.trainable_parameters()]
        self.rows_by_rank = tuple(parts.rows_by_rank or equal(parts.global_batch_size, world.size).rows)
        on_gpu, sharded = world.device.type == "cuda", is_sharded(parts.model)
        self.loader = StepLoader(
            parts.train_rows,
            parts.train_rows.order(options.seed),
            self.rows_by_rank,
            world.rank,
            options.per_device_train_batch_size,
            pin=world.device if on_gpu else None,
            in_step=sharded,
        )
        # What may be skipped must be known at once.
        may_lag = on_gpu and not options.skip_nonfinite and can_skip_on_device(parts.optimizer)
        lag = 1 if may_lag else 0
        self.loss_scale = None
        if parts.model.half_dtype == torch.float16:
            self.loss_scale = LossScale(world.device, progress.loss_scale, progress.good_steps)
        self.outcomes = Outcomes(world.device, lag, self.loss_scale)
        self.throughput = Throughput()
        self.stop_request = StopRequest(aborts_at=3 if world.size == 1 else None)
        self.saved_step = progress.step
        self.window: list[Outcome] = []
        self.asked_to_stop = False
        self.step_watch: Callable[[int], AbstractContextManager] = nullcontext
        """Entered with a step's number around it: the session's watchdog."""
        self.keep_rows: Callable[[int, np.ndarray], None] = lambda step, rows: None
        """Told the step and its rows when its numbers are not finite."""

    def train(self) -> str:
        """Run to the end, an early stop or a request to stop; returns finished, early_stopped or stopped."""
        progress, options = self.progress, self.options
        self.stop_request.install()
        if progress.step == 0 and not progress.history and options.eval_steps:  # not known from checkpoint-0
            self._evaluate()
        if progress.out_of_patience(options):
            return "early_stopped"
        with steady_collection() as after_step:
            self.throughput.start()
            while progress.step < self.parts.max_steps:
                with self.step_watch(progress.step + 1), during("training"):
                    self._step()
                after_step()
                if ended := self._after_step():
                    return ended
        return "finished"

    # -- one step ----------------------------------------------------------------------------------

    def _step(self) -> Outcome | None:
        """One optimizer step; returns the newest outcome that is known: with a lag, of a step before or none."""
        parts, progress = self.parts, self.progress
        data = self.loader.take(progress.rows)
        place = Place(progress.step, progress.rows, progress.tokens, data.rows)
        if data.num_targets == 0:  # of all ranks: they all pass over it
            log.warning(f"step {progress.step + 1} has no target token in its {len(data.rows)} rows: passed over")
            self._advance(data)
            return None
        self.module.train()
        self._seed()
        # DDP averages over ranks; times their number it is the sum that the loss is defined by.
        scale: float | torch.Tensor = self.world.size / data.num_targets
        if self.loss_scale:
            scale = scale * self.loss_scale.scale
        loss_sum = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(data.batches):
            with ddp.reduce_gradients(self.module, now=index == len(data.batches) - 1):
                nll_sum = self.module(**to_device(batch, self.world.device))
                (nll_sum * scale).backward()
            loss_sum += nll_sum.detach()
        if self.loss_scale:
            self.loss_scale.unscale(self.parameters)
        max_norm = self.options.max_grad_norm or math.inf
        grad_norm = ddp.clip_gradients(self.parameters, max_norm)
        self.outcomes.put(place, loss_sum.double() / data.num_targets, grad_norm, self._wants_stop())
        finite = True
        if self.outcomes.lag:
            parts.optimizer.found_inf = self.outcomes.found_inf
        else:
            finite = self._read_outcomes()
        if finite:
            take_step(parts.optimizer, self._learning_rate())
        parts.optimizer.zero_grad(set_to_none=True)
        self._advance(data)
        if self.outcomes.lag:
            self._read_outcomes(keep=self.outcomes.lag)
        return self.window[-1] if self.window else None

    def _advance(self, data: StepRows) -> None:
        """Count a step as done."""
        tokens = len(data.rows) * self.options.max_seq_length
        self.progress.step += 1
        self.progress.rows += len(data.rows)
        self.progress.tokens += tokens
        self.throughput.add(tokens)

    def _seed(self) -> None:
        """Random numbers are a function of seed, step and rank, so that a checkpoint needs no generator state."""
        torch.manual_seed((self.options.seed * 1_000_003 + self.progress.step) * 4096 + self.world.rank)

    def _learning_rate(self) -> float:
        return self.options.learning_rate * self.parts.schedule(self.progress.step)

    def _wants_stop(self) -> bool:
        return self.stop_request.signal_name is not None or (
            self.world.is_main and (self.stop_dir / STOP_FILE).exists()
        )

    def _read_outcomes(self, keep: int = 0) -> bool:
        """Take in what steps came to, all but the ``keep`` newest; on all ranks alike. False when one has no update.

        Raises: FlareError for numbers that are not finite. That update was not made, nor any after it.
        """
        finite = True
        for place, outcome in self.outcomes.take(keep):
            self.asked_to_stop |= outcome.stop
            self.progress.loss_scale, self.progress.good_steps = outcome.loss_scale, int(outcome.good_steps)
            finite &= outcome.finite
            if outcome.overflow:
                self._note_overflow(place, outcome)
            elif not outcome.finite:
                self._skip_or_refuse(place, outcome)
                continue
            self.window.append(outcome)
            if self.metrics:
                self.metrics.advance(outcome.loss, self._learning_rate())
        return finite

    def _note_overflow(self, place: Place, outcome: Outcome) -> None:
        """Count a step whose update was left out, as is usual in fp16: its rows are passed, its loss is logged."""
        self.progress.overflow_steps += 1
        log.info(
            f"step {place.step + 1}: the gradients overflow fp16, no update; loss scale {outcome.loss_scale:g} from "
            f"here on ({self.progress.overflow_steps} such steps so far)"
        )

    def _skip_or_refuse(self, place: Place, outcome: Outcome) -> None:
        """Count a step whose numbers are not finite. Raises: FlareError beyond ``--skip_nonfinite``."""
        progress, allowed = self.progress, self.options.skip_nonfinite
        self.keep_rows(place.step + 1, place.row_indices)
        what = (
            f"step {place.step + 1}: loss {outcome.loss} and gradient norm {outcome.grad_norm} are not finite (rows "
            f"{place.row_indices[:4].tolist()}...)"
        )
        if progress.skipped_steps < allowed:
            progress.skipped_steps += 1
            log.warning(f"{what}; skipped, {progress.skipped_steps} of {allowed} (--skip_nonfinite)")
            return
        progress.step, progress.rows, progress.tokens = place.step, place.rows, place.tokens
        raise FlareError(
            f"{what}; the weights were not updated, the last checkpoint is good; lower --learning_rate, or look at "
            "these rows in logs/" + RANGE_HINT * (self.loss_scale is not None)
        )

    # -- after a step -------------------------------------------------------------------------------

    def _after_step(self) -> str | None:
        """Log, evaluate and save where due; returns how training ends, if it does."""
        progress, options = self.progress, self.options
        at_end = progress.step == self.parts.max_steps
        log_due = at_end or progress.step % options.logging_steps == 0
        eval_due = bool(options.eval_steps) and (at_end or progress.step % options.eval_steps == 0)
        save_due = at_end or progress.step % options.save_steps == 0
        if log_due or eval_due or save_due or self.asked_to_stop:
            with self.step_watch(progress.step):
                self._read_outcomes()
        stop = self.asked_to_stop
        self.throughput.stop()
        if log_due:
            self._log()
        if eval_due:
            self._evaluate()
        if save_due or stop:
            self._save()
        self.throughput.start()
        if stop:
            return "stopped"
        if progress.out_of_patience(options):
            self._save()
            return "early_stopped"
        return None

    def _log(self) -> None:
        window, self.window = self.window, []
        if not window:  # every step since the last line was skipped
            return
        seconds, rate, peak = self.throughput.seconds, self.throughput.take(), self.parts.peak_flops
        mean = math.fsum(outcome.loss for outcome in window) / len(window)
        record = {
            "loss": mean,
            "perplexity": perplexity(mean),
            "learning_rate": self.options.learning_rate * self.parts.schedule(self.progress.step - 1),
            "grad_norm": next((o.grad_norm for o in reversed(window) if o.finite), None),  # None: all overflowed
            "tokens_per_sec": rate,
            "mfu": share_of(peak, rate, self.parts.model_flops_per_token),
            "executed_flops_use": share_of(peak, rate, self.parts.executed_flops_per_token),
            "data_wait": self.loader.take_wait() / seconds if seconds else 0.0,
            "memory_gib": self._peak_memory_gib(),
        }
        if self.loss_scale:
            record |= {"loss_scale": self.progress.loss_scale, "overflow_steps": self.progress.overflow_steps}
        self._record(record)

    def _peak_memory_gib(self) -> float:
        """Of the fullest rank. The ranks wait for each other here: under the step's clock, as in the step itself."""
        with self.step_watch(self.progress.step):
            return process_group.all_max([peak_memory_gib(self.world.device)])[0]

    def _record(self, numbers: dict) -> None:
        progress = self.progress
        epoch = self.parts.train_rows.epochs(progress.rows)
        record = {"step": progress.step, "epoch": epoch, "tokens": progress.tokens} | numbers
        progress.history.append(record)
        if self.metrics:
            self.metrics.record(record)

    # -- evaluation, saving, stopping ------------------------------------------------------------------

    @during("evaluating")
    def _evaluate(self) -> None:
        progress, options = self.progress, self.options
        score = functools.partial(evaluate_rows, self.parts, options, self.world, self.rows_by_rank)
        loss, accuracy = score()
        more = self.parts.more_evaluation(progress.step, lambda: score()[0]) if self.parts.more_evaluation else {}
        gain = progress.note_evaluation(loss, options.early_stopping_threshold)
        record = {"eval_loss": loss, "eval_perplexity": perplexity(loss), "eval_token_accuracy": accuracy}
        self._record(record | {"is_best": gain} | more)
        if gain and options.early_stopping_patience:
            self._save()  # the best weights must be there when patience runs out

    def _save(self) -> None:
        if self.saved_step == self.progress.step and self.progress.step > 0:
            return
        self.progress.data_place = self.parts.train_rows.place_at(self.progress.rows)
        self.save(self.progress)
        self.saved_step = self.progress.step
