"""The training loop: rows -> micro-batches -> clip gradients -> update -> log -> evaluate -> save.

The loss of a step is the sum of token losses over the complete global batch divided by its number of targets. So
loss and gradients do not depend on how the rows are divided among processes and micro-batches.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch

from flare.config.options import Options
from flare.distributed import ddp, process_group
from flare.distributed.fsdp import is_sharded
from flare.distributed.process_group import World
from flare.errors import FlareError, during
from flare.logs import log
from flare.model.inputs import to_device
from flare.optim.loss_scale import RANGE_HINT, LossScale
from flare.optim.optimizer import can_skip_on_device, optimizer_step
from flare.plan.balance import equal_balance
from flare.train.components import Callbacks, Components, evaluate_rows
from flare.train.garbage_collection import collect_at_intervals
from flare.train.loader import StepLoader, StepRows
from flare.train.metrics import Throughput, peak_memory_gib, perplexity, share_of
from flare.train.step_results import PendingResults, StepResult, StepStart
from flare.train.stop import STOP_FILE, StopRequest
from flare.train.train_state import TrainState


class Due(NamedTuple):
    """What happens after a step."""

    log: bool
    evaluate: bool
    save: bool


class Trainer:
    """Trains one stage.

    Args:
        train_state: where training starts; updated with each step.
        stop_dir: the directory in which a file ``STOP`` requests a clean stop.
    """

    def __init__(
        self,
        components: Components,
        options: Options,
        world: World,
        train_state: TrainState,
        callbacks: Callbacks,
        stop_dir: Path,
    ) -> None:
        self.components = components
        self.options = options
        self.world = world
        self.train_state = train_state
        self.callbacks = callbacks
        self.stop_dir = stop_dir
        model, optimizer = components.model, components.optimizer
        self.module = ddp.wrap_ddp(model, world)
        self.parameters = [p for _, p in model.trainable_parameters()]
        self.rows_by_rank = tuple(
            components.rows_by_rank or equal_balance(components.global_batch_size, world.size).rows
        )
        on_gpu = world.device.type == "cuda"
        self.loader = StepLoader(
            components.train_rows,
            components.train_rows.order(options.seed),
            self.rows_by_rank,
            world.rank,
            options.per_device_train_batch_size,
            pin=world.device if on_gpu else None,
            in_step=is_sharded(model),
        )
        # With --skip_nonfinite the host must know at once whether a step is skipped.
        may_lag = on_gpu and not options.skip_nonfinite and can_skip_on_device(optimizer)
        self.loss_scale = None
        if model.half_dtype == torch.float16:
            self.loss_scale = LossScale(world.device, train_state.loss_scale, train_state.good_steps)
        self.pending = PendingResults(world.device, lag=1 if may_lag else 0, loss_scale=self.loss_scale)
        self.throughput = Throughput()
        self.stop_request = StopRequest(aborts_at=3 if world.size == 1 else None)
        self.saved_step = train_state.step
        self.window: list[StepResult] = []  # since the last log line
        self.stop_voted = False

    def train(self) -> str:
        """Train to the last step, an early stop or a requested stop. Returns finished, early_stopped or stopped."""
        train_state, options = self.train_state, self.options
        self.stop_request.install()
        if train_state.step == 0 and not train_state.history and options.eval_steps:  # checkpoint-0 has it already
            self._evaluate()
        if train_state.out_of_patience(options):
            return "early_stopped"
        with collect_at_intervals() as after_step:
            self.throughput.start()
            while train_state.step < self.components.max_steps:
                with self.callbacks.watch_step(train_state.step + 1), during("training"):
                    self._step()
                after_step()
                due = self._due()
                with self.throughput.paused():
                    if due.log:
                        self._log()
                    if due.evaluate:
                        self._evaluate()
                    if due.save:
                        self._save()
                if self.stop_voted:
                    return "stopped"
                if train_state.out_of_patience(options):
                    self._save()
                    return "early_stopped"
        return "finished"

    # -- one step ----------------------------------------------------------------------------------

    def _step(self) -> StepResult | None:
        """One optimizer step. Returns the newest known result; with a lag that of an earlier step, or None."""
        optimizer, train_state = self.components.optimizer, self.train_state
        data = self.loader.take(train_state.rows)
        start = StepStart(train_state.step, train_state.rows, train_state.tokens, data.rows)
        if data.num_targets == 0:  # on all ranks: they all skip it
            log.warning(f"step {start.step + 1} has no target token in its {len(data.rows)} rows and is skipped")
            self._advance(data)
            return None
        self.module.train()
        self._seed()
        # DDP averages over ranks; times the number of ranks this is the sum that the loss is defined with.
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
        self.pending.put(start, loss_sum.double() / data.num_targets, grad_norm, self._wants_stop())
        finite = True
        if self.pending.lag:
            optimizer.found_inf = self.pending.found_inf
        else:
            finite = self._read_results()
        if finite:
            optimizer_step(optimizer, self._learning_rate())
        optimizer.zero_grad(set_to_none=True)
        self._advance(data)
        if self.pending.lag:
            self._read_results(keep=self.pending.lag)
        return self.window[-1] if self.window else None

    def _advance(self, data: StepRows) -> None:
        """Count a step as done."""
        tokens = len(data.rows) * self.options.max_seq_length
        self.train_state.step += 1
        self.train_state.rows += len(data.rows)
        self.train_state.tokens += tokens
        self.throughput.add(tokens)

    def _seed(self) -> None:
        """Seed from the run's seed, the step and the rank, so that a checkpoint needs no generator state."""
        torch.manual_seed((self.options.seed * 1_000_003 + self.train_state.step) * 4096 + self.world.rank)

    def _learning_rate(self) -> float:
        return self.options.learning_rate * self.components.schedule(self.train_state.step)

    def _wants_stop(self) -> bool:
        return self.stop_request.signal_name is not None or (
            self.world.is_main and (self.stop_dir / STOP_FILE).exists()
        )

    def _read_results(self, keep: int = 0) -> bool:
        """Read the results of all steps except the ``keep`` newest, on all ranks. False when one has no update.

        Raises: FlareError for numbers that are not finite. That update and all later ones were not applied.
        """
        finite = True
        for start, result in self.pending.take(keep):
            self.stop_voted |= result.stop
            self.train_state.loss_scale, self.train_state.good_steps = result.loss_scale, int(result.good_steps)
            finite &= result.finite
            if result.overflow:
                self._count_overflow(start, result)
            elif not result.finite:
                self._skip_or_fail(start, result)
                continue
            self.window.append(result)
            if self.callbacks.metrics:
                self.callbacks.metrics.advance(result.loss, self._learning_rate())
        return finite

    def _count_overflow(self, start: StepStart, result: StepResult) -> None:
        """Count a step without an update, which is normal in fp16. Its rows count as used, its loss is logged."""
        self.train_state.overflow_steps += 1
        log.info(
            f"step {start.step + 1}: the gradients overflow fp16, no update; loss scale {result.loss_scale:g} from "
            f"here on ({self.train_state.overflow_steps} such steps so far)"
        )

    def _skip_or_fail(self, start: StepStart, result: StepResult) -> None:
        """Count a step whose numbers are not finite. Raises: FlareError beyond ``--skip_nonfinite``."""
        train_state, allowed = self.train_state, self.options.skip_nonfinite
        self.callbacks.write_bad_rows(start.step + 1, start.row_indices)
        message = (
            f"step {start.step + 1}: loss {result.loss} and gradient norm {result.grad_norm} are not finite (rows "
            f"{start.row_indices[:4].tolist()}...)"
        )
        if train_state.skipped_steps < allowed:
            train_state.skipped_steps += 1
            log.warning(f"{message}; skipped, {train_state.skipped_steps} of {allowed} (--skip_nonfinite)")
            return
        train_state.step, train_state.rows, train_state.tokens = start.step, start.rows, start.tokens
        raise FlareError(
            f"{message}; the weights were not updated, the last checkpoint is good; lower --learning_rate, or look at "
            "these rows in logs/" + RANGE_HINT * (self.loss_scale is not None)
        )

    # -- after a step: log, evaluate, save -----------------------------------------------------------

    def _due(self) -> Due:
        """What is due after this step. If anything is, the results of all steps are read first."""
        step, options = self.train_state.step, self.options
        at_end = step == self.components.max_steps
        log_due = at_end or step % options.logging_steps == 0
        eval_due = bool(options.eval_steps) and (at_end or step % options.eval_steps == 0)
        save_due = at_end or step % options.save_steps == 0
        if log_due or eval_due or save_due or self.stop_voted:
            with self.callbacks.watch_step(step):
                self._read_results()
        return Due(log_due, eval_due, save_due or self.stop_voted)

    def _log(self) -> None:
        window, self.window = self.window, []
        if not window:  # every step since the last line was skipped
            return
        components = self.components
        seconds, rate, peak = self.throughput.seconds, self.throughput.take(), components.peak_flops
        mean = math.fsum(result.loss for result in window) / len(window)
        record = {
            "loss": mean,
            "perplexity": perplexity(mean),
            "learning_rate": self.options.learning_rate * components.schedule(self.train_state.step - 1),
            "grad_norm": next((r.grad_norm for r in reversed(window) if r.finite), None),  # None: all overflowed
            "tokens_per_sec": rate,
            "mfu": share_of(peak, rate, components.model_flops_per_token),
            "executed_flops_use": share_of(peak, rate, components.executed_flops_per_token),
            "data_wait": self.loader.take_wait() / seconds if seconds else 0.0,
            "memory_gib": self._peak_memory_gib(),
        }
        if self.loss_scale:
            record |= {"loss_scale": self.train_state.loss_scale, "overflow_steps": self.train_state.overflow_steps}
        self._record(record)

    def _peak_memory_gib(self) -> float:
        """The highest of all ranks. The ranks wait for each other here, so the watchdog's clock runs as in a step."""
        with self.callbacks.watch_step(self.train_state.step):
            return process_group.all_reduce_max([peak_memory_gib(self.world.device)])[0]

    def _record(self, numbers: dict) -> None:
        train_state = self.train_state
        epoch = self.components.train_rows.epochs(train_state.rows)
        record = {"step": train_state.step, "epoch": epoch, "tokens": train_state.tokens} | numbers
        train_state.history.append(record)
        if self.callbacks.metrics:
            self.callbacks.metrics.record(record)

    @during("evaluating")
    def _evaluate(self) -> None:
        train_state, options, more = self.train_state, self.options, self.callbacks.evaluate_more
        score = functools.partial(evaluate_rows, self.components, options, self.world, self.rows_by_rank)
        loss, accuracy = score()
        extra = more(train_state.step, lambda: score()[0]) if more else {}
        gain = train_state.add_evaluation(loss, options.early_stopping_threshold)
        record = {"eval_loss": loss, "eval_perplexity": perplexity(loss), "eval_token_accuracy": accuracy}
        self._record(record | {"is_best": gain} | extra)
        if gain and options.early_stopping_patience:
            self._save()  # final_model is made from the best weights when patience runs out

    def _save(self) -> None:
        if self.saved_step == self.train_state.step and self.train_state.step > 0:
            return
        self.train_state.data_place = self.components.train_rows.place_at(self.train_state.rows)
        self.callbacks.save(self.train_state)
        self.saved_step = self.train_state.step
