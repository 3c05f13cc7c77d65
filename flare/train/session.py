"""A stage's session on one rank: model, optimizer, rows and progress are put together, trained and exported."""

import contextlib
from pathlib import Path

import numpy as np
import torch
from torch.distributed import PrefixStore

from flare.checkpoint.directory import Checkpoint
from flare.checkpoint.tensor_files import TensorReader
from flare.config.options import SELECTIVE
from flare.data.packing import PackedRows
from flare.data.preview import row_lines, write_rows
from flare.data.training_rows import TrainRows
from flare.distributed import process_group
from flare.distributed.fsdp import is_sharded
from flare.distributed.process_group import World
from flare.distributed.watchdog import Limits, Watchdog
from flare.errors import CheckpointError, FlareError, during
from flare.evaluation.during_training import LengthCurve, MoreEvaluation
from flare.gpus.selection import gpu_line
from flare.gpus.specs import peak_tflops
from flare.hub import read_model_config
from flare.launch.worker_errors import tell_launcher
from flare.logs import FILES_ONLY, log
from flare.model.attention import KERNELS, use_kernel
from flare.model.compile import compile_layers
from flare.model.inputs import host_tensors, to_device
from flare.model.training_model import TrainingModel, checkpoint_layers, load_for_training, load_in_place
from flare.nope.config_json import nope_layers_of
from flare.nope.layers import format_layers
from flare.nope.load import load_tokenizer
from flare.nope.probe import verify_nope
from flare.optim.optimizer import build_optimizer, build_schedule, load_optimizer_tensors
from flare.plan.table import plan_lines
from flare.run.metrics_file import record_status
from flare.run.run import Run
from flare.train.components import Parts
from flare.train.metrics import MetricsWriter, summary_lines
from flare.train.prepare_data import AnyCorpus, max_steps
from flare.train.rank_speed import multiply_as_a_layer, settle_balance
from flare.train.resume import find_checkpoint, read_progress
from flare.train.saver import Saver
from flare.train.stop import STOP_FILE
from flare.train.tensorboard import hyperparameters
from flare.train.train_state import Progress
from flare.train.trainer import Trainer


class Session:
    """Model, optimizer and progress of one stage, put together and run."""

    def __init__(
        self, run: Run, world: World, corpus: AnyCorpus, train_rows: TrainRows, eval_rows: PackedRows
    ) -> None:
        self.run, self.world, self.corpus = run, world, corpus
        self.train_rows, self.eval_rows = train_rows, eval_rows
        self.options, self.experiment = run.options, run.experiment
        self.identity = run.identity() | {"data": corpus.fingerprint}
        self.saver = Saver(run, world, self.identity, corpus.facts, run.global_batch_size)

    def train(self) -> None:
        """From the newest checkpoint, or the start, to the end of the stage."""
        self._log_start()
        resume_from = process_group.on_main(self.world, lambda: find_checkpoint(self.run))
        progress = read_progress(resume_from, self.saver)
        self._settle_length()
        if self._is_done(progress):
            early = progress.step < self.max_steps
            log.info(
                f"stage {self.options.stage} of {self.experiment.root.name!r} is finished already (step "
                f"{progress.step}{', early stop' if early else ''}); a larger "
                f"{'--early_stopping_patience' if early else '--max_steps'} continues it"
            )
            self.saver.record("finished", progress)
            return
        self._start_rows(progress)
        self._build(resume_from)
        self._settle_balance(resume_from, progress.rows)
        facts = {"settings": self.run.settings(), "identity": self.identity, "starts_from": str(self.run.init_from)}
        self.saver.record("running", progress, early_stopped=False, **facts)
        metrics = None
        try:
            if self.world.is_main:
                metrics = MetricsWriter(self.experiment, self.options.stage, self.max_steps, progress.history)
                facts = hyperparameters(self.run, self.saver.global_batch_size, self.max_steps)
                metrics.describe(facts, plan_lines(self.run.plan()))
            trainer = Trainer(
                self._parts(), self.options, self.world, progress, self.saver.checkpoint, self.experiment.root, metrics
            )
            with self._watchdog() as watchdog:
                trainer.step_watch = watchdog.step
                trainer.keep_rows = self._keep_rows
                ended = trainer.train()
            self._finish(ended, progress)
        except BaseException as error:
            self.saver.record("failed", progress, error=str(error) or type(error).__name__)
            raise
        finally:
            if metrics:
                metrics.close()
        if ended != "stopped":  # below the bar
            for line in summary_lines(self.experiment, self.options.stage, progress.history, progress.tokens):
                log.info(line)

    def _keep_rows(self, step: int, rows: np.ndarray) -> None:
        """Write the rows of a step that went wrong to logs/, as token ids and as text."""
        if self.world.is_main:
            path = self.experiment.logs / f"nonfinite-stage{self.options.stage}-step{step}.jsonl"
            write_rows(path, rows, self.train_rows.batch(rows).input_ids, load_tokenizer(self.run.init_from))

    def _watchdog(self) -> Watchdog:
        limits = Limits.of(self.options.step_timeout, self.options.ddp_timeout)
        store = self.world.store and PrefixStore("watchdog", self.world.store.clone())  # a thread's own connection
        return Watchdog(self.world.rank, self.world.size, store, limits, self.experiment.logs, self._tell_hang)

    def _tell_hang(self, message: str) -> None:
        """From the watchdog of one rank, not always the first: the main thread will never tell."""
        told = tell_launcher(message, FlareError.exit_code)
        log.error(f"error: {message}", extra=FILES_ONLY if told else {})
        with contextlib.suppress(OSError):  # on a full disk the run must end all the same
            record_status(self.experiment, self.options.stage, "failed", error=message)

    # -- start -------------------------------------------------------------------------------------

    def _log_start(self) -> None:
        run, options, meta = self.run, self.options, self.corpus.meta
        for warning in run.resolved.warnings:
            log.warning(warning)
        reason = run.init_reason
        for gpu in run.hardware.gpus:  # of this host; the launcher has told the terminal
            log.info(gpu_line(gpu), extra=FILES_ONLY)
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

    def _start_rows(self, progress: Progress) -> None:
        """Get the training rows ready, and show a first one of them."""
        rows = self.train_rows
        rows.start(self.world, progress.data_place, self.saver.global_batch_size)
        if self.world.is_main:
            rows.order(self.options.seed).rows(progress.rows, progress.rows + 1)  # waits until there are streamed ones
            first = rows.batch(np.array([rows.any_row()])).input_ids[0]
            for line in row_lines(first, self.corpus.end_of_text_id, load_tokenizer(self.run.init_from)):
                log.info(line)

    def _settle_length(self) -> None:
        """Steps of the stage, from the global batch that the run really has."""
        rows, length = self.saver.global_batch_size, self.options.max_seq_length
        self.max_steps = self.saver.max_steps = max_steps(self.run, self.train_rows, rows)
        log.info(f"{self.max_steps} steps of {rows} rows x {length} tokens = {rows * length:,} tokens a step")
        for line in self.train_rows.passes(self.max_steps * rows):
            log.info(line)

    def _is_done(self, progress: Progress) -> bool:
        """Whether nothing is left to train and final_model is of this very step (not of a shorter run before)."""
        exported = self.experiment.trained(self.experiment.final_model)
        is_exported = (exported.get("stage"), exported.get("step")) == (self.options.stage, progress.step)
        return is_exported and (progress.step >= self.max_steps or progress.out_of_patience(self.options))

    # -- parts -------------------------------------------------------------------------------------

    @during("loading the model")
    def _build(self, resume_from: Checkpoint | None) -> None:
        """Load weights and make the optimizer; from a checkpoint, both as they were."""
        run = self.run
        self.model = self._load_model(run.init_from, resume_from)
        if run.gradient_checkpointing:
            selective = run.gradient_checkpointing == SELECTIVE
            layers = checkpoint_layers(self.model.causal_lm, selective)
            log.info(f"{'selective ' if selective else ''}gradient checkpointing on layers {format_layers(layers)}")
        self.optimizer = build_optimizer(self.model.trainable_parameters(), self.options)
        reader = TensorReader.of_state(resume_from.path, "optimizer") if resume_from else None
        if reader and reader.names():  # before its first update, which may come after some steps, Adam has no state
            try:
                load_optimizer_tensors(self.optimizer, reader)
            except KeyError as error:
                raise CheckpointError(f"{resume_from.path.name}: optimizer state is incomplete: {error}") from error
        counts = [0, 0]
        for parameter in self.model.causal_lm.parameters():
            counts[parameter.requires_grad] += parameter.numel()
        log.info(f"parameters: {counts[1]:,} trainable, {counts[0]:,} frozen")
        self.saver.attach(self.model, self.optimizer)
        found = verify_nope(self.model.causal_lm, list(run.nope_layers), decode=self.model.decode)
        log.info(f"NoPE layers proven from attention outputs: {format_layers(found)}")
        if run.attention in KERNELS:
            use_kernel(self.model.causal_lm, run.attention)
        if self.options.compile:
            compile_layers(self.model)
            log.info("each decoder layer is compiled in the first step, which takes a while")

    def _settle_balance(self, resume_from: Checkpoint | None, position: int) -> None:
        """Who gets how many rows of a step."""
        size = self.saver.global_batch_size
        micro = min(self.run.micro_batch_size, size)
        first = self.train_rows.order(self.options.seed).rows(position, position + micro)

        def work() -> int:
            if is_sharded(self.model):  # its passes wait for all ranks, so they cannot tell this one's speed
                dtype = self.model.half_dtype or torch.float32
                multiply_as_a_layer(
                    self.run.config, len(first) * self.options.max_seq_length, self.world.device, dtype
                )
                return len(first)
            self.model.train()
            self.model(**to_device(host_tensors(self.train_rows.batch(first)), self.world.device)).backward()
            self.optimizer.zero_grad(set_to_none=True)
            return len(first)

        record = resume_from.state().get("balance") if resume_from else None
        self.saver.balance = settle_balance(self.options.balance, size, self.world, record, work)
        if self.world.size > 1:
            log.info(f"rows of a step by rank: {list(self.saver.balance.rows)} ({self.saver.balance.reason})")

    def _load_model(self, start: Path, resume_from: Checkpoint | None) -> TrainingModel:
        """The model, ready to train on this rank's device, with a checkpoint's weights or those to start from."""
        run = self.run
        source, documents = resume_from.path if resume_from else start, self.options.packing == "document"
        how = (run.config, run.trainable, run.precision, run.attention)
        sharded = run.parallel == "fsdp"
        if sharded:
            log.info(f"FSDP2: weights, gradients and optimizer state are divided among {self.world.size} processes")
        if sharded or resume_from:  # opened as a model, a checkpoint's fp32 masters are rounded to the base's dtype
            return load_in_place(source, *how, self.world, documents, sharded)
        return load_for_training(source, *how, documents).to(self.world.device)

    def _parts(self) -> Parts:
        flops = self.run.plan().flops
        return Parts(
            model=self.model,
            optimizer=self.optimizer,
            schedule=build_schedule(self.options, self.max_steps),
            train_rows=self.train_rows,
            eval_rows=self.eval_rows,
            max_steps=self.max_steps,
            global_batch_size=self.saver.global_batch_size,
            rows_by_rank=self.saver.balance.rows,
            model_flops_per_token=float(flops.model),
            executed_flops_per_token=float(flops.executed),
            peak_flops=self._peak_flops(),
            more_evaluation=self._more_evaluation(),
        )

    def _peak_flops(self) -> float | None:
        """Of all GPUs together, a second; None on the CPU or with a GPU whose peak is not known."""
        name = torch.cuda.get_device_name(self.world.device) if self.world.device.type == "cuda" else None
        peaks = [peak_tflops(name) if name else None for name in process_group.gather_objects(name)]
        return None if None in peaks else sum(peaks) * 1e12

    def _more_evaluation(self) -> MoreEvaluation:
        """The length curve, if asked for; and of a model that nothing has trained yet, what the base's loss is."""
        run, options, model, world = self.run, self.options, self.model, self.world
        curve = None
        if options.eval_context_lengths:
            tokens = options.per_device_train_batch_size * options.max_seq_length
            lengths = options.eval_context_lengths
            curve = LengthCurve(model, self.eval_rows, lengths, tokens, world)
        raw = read_model_config(run.init_from)
        changed = raw.get("nope_temperature") or (nope_layers_of(raw) and "flare" in raw)
        return MoreEvaluation(model.causal_lm, curve, from_base=bool(run.nope_layers) and not changed)

    def _finish(self, ended: str, progress: Progress) -> None:
        """Final model and status, or the status of a clean stop."""
        if ended == "stopped":
            if self.world.is_main:
                (self.experiment.root / STOP_FILE).unlink(missing_ok=True)
            log.info(f"stopped at step {progress.step}; the same command continues")
            self.saver.record("stopped", progress)
            return
        self.saver.final_model(progress)
        early = ended == "early_stopped"
        log.info(
            f"finished stage {self.options.stage} at step {progress.step}{' (early stop)' if early else ''} without "
            f"errors; final model: {self.experiment.final_model}"
        )
        self.saver.record("finished", progress, early_stopped=early)


def device_name(device: torch.device) -> str:
    """The GPU's name, or how many threads of the CPU this process uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"
