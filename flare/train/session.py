"""A stage on one rank: puts model, optimizer, rows and train state together, trains, and writes the final model."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch.distributed import PrefixStore

from flare.checkpoint.directory import Checkpoint
from flare.data.packing import PackedRows
from flare.data.preview import row_lines, write_rows
from flare.data.training_rows import TrainRows
from flare.distributed import process_group
from flare.distributed.fsdp import is_sharded
from flare.distributed.process_group import World
from flare.distributed.watchdog import StepLimits, Watchdog
from flare.errors import FlareError, during
from flare.evaluation.during_training import LengthCurve, MoreEvaluation
from flare.gpus.selection import describe_gpu
from flare.gpus.specs import peak_tflops
from flare.hub import read_model_config
from flare.launch.worker_errors import report_to_launcher
from flare.logs import FILES_ONLY, log
from flare.model.inputs import host_tensors, to_device
from flare.model.training_model import TrainingModel
from flare.nope.config_json import nope_layers_of
from flare.nope.layers import format_layers
from flare.nope.load import load_tokenizer
from flare.optim.lr_schedule import build_schedule
from flare.plan.balance import Balance
from flare.plan.table import plan_lines
from flare.run.metrics_file import record_status
from flare.run.run import Run
from flare.train.build_model import build_loaded_optimizer, build_model
from flare.train.components import Callbacks, Components
from flare.train.metrics import MetricsWriter, summary_lines
from flare.train.prepare_data import AnyCorpus, max_steps
from flare.train.rank_speed import choose_balance, multiply_as_a_layer
from flare.train.resume import find_checkpoint, read_train_state
from flare.train.saver import Saver
from flare.train.stage_facts import StageFacts, StageStatus
from flare.train.stop import STOP_FILE
from flare.train.tensorboard import hyperparameters
from flare.train.train_state import TrainState
from flare.train.trainer import Trainer


class Session:
    """Trains one stage on this rank. ``train`` is a collective."""

    def __init__(
        self, run: Run, world: World, corpus: AnyCorpus, train_rows: TrainRows, eval_rows: PackedRows
    ) -> None:
        self.run, self.world, self.corpus = run, world, corpus
        self.train_rows, self.eval_rows = train_rows, eval_rows
        self.options, self.experiment = run.options, run.experiment

    def train(self) -> None:
        """Train from the newest checkpoint, or from the start, to the end of the stage."""
        self._log_start()
        resume_from = process_group.run_on_main_rank(self.world, lambda: find_checkpoint(self.run))
        train_state, facts = self._resolve(resume_from)
        status = StageStatus(self.run, self.world, facts.max_steps)
        if self._is_finished(train_state, facts):
            status.record("finished", train_state)
            return
        self._start_rows(train_state, facts)
        model, optimizer = self._build(resume_from)
        balance = self._choose_balance(facts, model, resume_from, train_state.rows)
        saver = Saver(self.run, self.world, facts, balance, model, optimizer)
        self._record_start(status, train_state, facts)
        try:
            with self._open_metrics(train_state, facts) as metrics:
                components = self._components(facts, balance, model, optimizer)
                ended = self._run_trainer(components, train_state, saver, status, metrics)
                self._finish(ended, saver, status, train_state)
        except BaseException as error:
            status.record("failed", train_state, error=str(error) or type(error).__name__)
            raise
        if ended != "stopped":  # after the progress bar is closed
            for line in summary_lines(self.experiment, self.options.stage, train_state.history, train_state.tokens):
                log.info(line)

    def _run_trainer(
        self,
        components: Components,
        train_state: TrainState,
        saver: Saver,
        status: StageStatus,
        metrics: MetricsWriter | None,
    ) -> str:
        """Train. Returns how training ended: see ``Trainer.train``."""

        def save(train_state: TrainState) -> None:
            saver.checkpoint(train_state)
            status.record("running", train_state)

        evaluate_more = self._more_evaluation(components.model)
        with self._watchdog() as watchdog:
            callbacks = Callbacks(save, metrics, watchdog.step, self._write_bad_rows, evaluate_more)
            root = self.experiment.root
            return Trainer(components, self.options, self.world, train_state, callbacks, root).train()

    # -- start -------------------------------------------------------------------------------------

    def _log_start(self) -> None:
        run, options, meta = self.run, self.options, self.corpus.meta
        for warning in run.resolved.warnings:
            log.warning(warning)
        reason = run.init_reason
        for gpu in run.hardware.gpus:  # of this host; the launcher has printed them in the terminal
            log.info(describe_gpu(gpu), extra=FILES_ONLY)
        for line in plan_lines(run.plan()):
            log.info(line)
        (log.warning if reason.startswith("warning") else log.info)(reason.removeprefix("warning: "))
        log.info(
            f"device: {self.world.size} x {device_name(self.world.device)}, precision {run.precision} "
            f"({run.precision_reason})"
        )
        log.info(f"NoPE layers: {format_layers(list(run.nope_layers))} of {run.depth}; trains: {run.trainable}")
        log.info(f"data: {options.dataset_name}; documents end with {meta['end_of_text']} ({meta['end_of_text_id']})")
        log.info(f"train: {self.train_rows.describe()}")
        log.info(f"held out: {self.eval_rows.describe()}")

    def _resolve(self, resume_from: Checkpoint | None) -> tuple[TrainState, StageFacts]:
        """The train state to continue from, and the facts of the stage."""
        run, size = self.run, self.world.size
        identity = run.identity() | {"data": self.corpus.fingerprint}
        train_state, rows = read_train_state(resume_from, run, self.world, identity, self.corpus.facts)
        facts = StageFacts(
            identity=identity,
            data=self.corpus.facts,
            global_batch_size=rows,
            rows_per_process=run.global_batch_size // size,
            max_steps=max_steps(run, self.train_rows, rows),
        )
        length = self.options.max_seq_length
        log.info(f"{facts.max_steps} steps of {rows} rows x {length} tokens = {rows * length:,} tokens a step")
        for line in self.train_rows.passes(facts.max_steps * rows):
            log.info(line)
        return train_state, facts

    def _record_start(self, status: StageStatus, train_state: TrainState, facts: StageFacts) -> None:
        record = {"settings": self.run.settings(), "identity": facts.identity, "starts_from": str(self.run.init_from)}
        status.record("running", train_state, early_stopped=False, **record)

    def _is_finished(self, train_state: TrainState, facts: StageFacts) -> bool:
        """Whether nothing is left to train, and final_model has the weights of this step and not of an earlier one."""
        exported = self.experiment.trained(self.experiment.final_model)
        if (exported.get("stage"), exported.get("step")) != (self.options.stage, train_state.step):
            return False
        early = train_state.step < facts.max_steps
        if early and not train_state.out_of_patience(self.options):
            return False
        log.info(
            f"stage {self.options.stage} of {self.experiment.root.name!r} is finished already (step "
            f"{train_state.step}{', early stop' if early else ''}); a larger "
            f"{'--early_stopping_patience' if early else '--max_steps'} continues it"
        )
        return True

    def _start_rows(self, train_state: TrainState, facts: StageFacts) -> None:
        """Prepare the training rows for the first step, and log one row as text."""
        rows, position = self.train_rows, train_state.rows
        rows.start(self.world, train_state.data_place, facts.global_batch_size)
        if self.world.is_main:
            rows.order(self.options.seed).rows(position, position + 1)  # waits for the first streamed rows
            first = rows.batch(np.array([rows.any_row()])).input_ids[0]
            for line in row_lines(first, self.corpus.end_of_text_id, load_tokenizer(self.run.init_from)):
                log.info(line)

    # -- components and callbacks --------------------------------------------------------------------

    @during("loading the model")
    def _build(self, resume_from: Checkpoint | None) -> tuple[TrainingModel, torch.optim.Optimizer]:
        model = build_model(self.run, self.world, resume_from)
        return model, build_loaded_optimizer(model, self.options, resume_from)

    def _choose_balance(
        self, facts: StageFacts, model: TrainingModel, resume_from: Checkpoint | None, position: int
    ) -> Balance:
        """How many rows of a step each rank gets."""
        size = facts.global_batch_size
        micro = min(self.run.micro_batch_size, size)
        first = self.train_rows.order(self.options.seed).rows(position, position + micro)

        def work() -> int:
            if is_sharded(model):  # in its passes all ranks wait for each other, so they do not show one rank's speed
                tokens = len(first) * self.options.max_seq_length
                multiply_as_a_layer(self.run.config, tokens, self.world.device, model.half_dtype or torch.float32)
                return len(first)
            model.train()
            model(**to_device(host_tensors(self.train_rows.batch(first)), self.world.device)).backward()
            model.zero_grad(set_to_none=True)
            return len(first)

        record = resume_from.state().get("balance") if resume_from else None
        balance = choose_balance(self.options.balance, size, self.world, record, work)
        if self.world.size > 1:
            log.info(f"rows of a step by rank: {list(balance.rows)} ({balance.reason})")
        return balance

    def _components(
        self, facts: StageFacts, balance: Balance, model: TrainingModel, optimizer: torch.optim.Optimizer
    ) -> Components:
        flops = self.run.plan().flops
        return Components(
            model=model,
            optimizer=optimizer,
            schedule=build_schedule(self.options, facts.max_steps),
            train_rows=self.train_rows,
            eval_rows=self.eval_rows,
            max_steps=facts.max_steps,
            global_batch_size=facts.global_batch_size,
            rows_by_rank=balance.rows,
            model_flops_per_token=float(flops.model),
            executed_flops_per_token=float(flops.executed),
            peak_flops=self._peak_flops(),
        )

    def _peak_flops(self) -> float | None:
        """Of all GPUs together, per second. None on the CPU, or when the peak of a GPU is not known."""
        name = torch.cuda.get_device_name(self.world.device) if self.world.device.type == "cuda" else None
        peaks = [peak_tflops(name) if name else None for name in process_group.gather_objects(name)]
        return None if None in peaks else sum(peaks) * 1e12

    @contextlib.contextmanager
    def _open_metrics(self, train_state: TrainState, facts: StageFacts) -> Iterator[MetricsWriter | None]:
        """The metrics writer on rank 0, None on other ranks."""
        if not self.world.is_main:
            yield None
            return
        metrics = MetricsWriter(self.experiment, self.options.stage, facts.max_steps, train_state.history)
        try:
            settings = hyperparameters(self.run, facts.global_batch_size, facts.max_steps)
            metrics.describe(settings, plan_lines(self.run.plan()))
            yield metrics
        finally:
            metrics.close()

    def _write_bad_rows(self, step: int, rows: np.ndarray) -> None:
        """Write the rows of a step whose numbers are not finite to logs/, as token ids and as text."""
        if self.world.is_main:
            path = self.experiment.logs / f"nonfinite-stage{self.options.stage}-step{step}.jsonl"
            write_rows(path, rows, self.train_rows.batch(rows).input_ids, load_tokenizer(self.run.init_from))

    def _more_evaluation(self, model: TrainingModel) -> MoreEvaluation:
        """The length curve, if it is requested, and before the first training the loss of the base model."""
        run, options = self.run, self.options
        curve = None
        if options.eval_context_lengths:
            tokens = options.per_device_train_batch_size * options.max_seq_length
            curve = LengthCurve(model, self.eval_rows, options.eval_context_lengths, tokens, self.world)
        raw = read_model_config(run.init_from)
        changed = raw.get("nope_temperature") or (nope_layers_of(raw) and "flare" in raw)
        return MoreEvaluation(model.causal_lm, curve, from_base=bool(run.nope_layers) and not changed)

    def _watchdog(self) -> Watchdog:
        limits = StepLimits.of(self.options.step_timeout, self.options.ddp_timeout)
        store = self.world.store and PrefixStore("watchdog", self.world.store.clone())  # a connection for its thread
        return Watchdog(self.world.rank, self.world.size, store, limits, self.experiment.logs, self._report_hang)

    def _report_hang(self, message: str) -> None:
        """Called by the watchdog of one rank, not always rank 0, because the main thread cannot report any more."""
        reported = report_to_launcher(message, FlareError.exit_code)
        log.error(f"error: {message}", extra=FILES_ONLY if reported else {})
        with contextlib.suppress(OSError):  # the run must end on a full disk, too
            record_status(self.experiment, self.options.stage, "failed", error=message)

    # -- end ------------------------------------------------------------------------------------------

    def _finish(self, ended: str, saver: Saver, status: StageStatus, train_state: TrainState) -> None:
        """Write the final model and the status, or the status of a clean stop."""
        if ended == "stopped":
            if self.world.is_main:
                (self.experiment.root / STOP_FILE).unlink(missing_ok=True)
            log.info(f"stopped at step {train_state.step}; the same command continues")
            status.record("stopped", train_state)
            return
        saver.final_model(train_state)
        early = ended == "early_stopped"
        log.info(
            f"finished stage {self.options.stage} at step {train_state.step}{' (early stop)' if early else ''} "
            f"without errors; final model: {self.experiment.final_model}"
        )
        status.record("finished", train_state, early_stopped=early)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of CPU threads that this process uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"
