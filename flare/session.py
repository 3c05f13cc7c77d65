"""One worker's life: data, process group, experiment directory, model, resume, train, final model.

``run_worker`` is the same for one process and for many; what only rank 0 may do goes through
``distributed.on_main``.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.distributed import PrefixStore

from flare import checkpoint as ckpt
from flare import distress, distributed
from flare.attention import KERNELS, use_kernel
from flare.checkpoint import Checkpoint
from flare.compiler import compile_layers
from flare.config import REPO
from flare.data.corpus import Corpus, what_changed
from flare.data.packing import PackedRows
from flare.data.preview import row_lines
from flare.data.streaming.survey import StreamedCorpus
from flare.data.train_rows import TrainRows
from flare.distributed import World
from flare.errors import CheckpointError, ConfigError, FlareError
from flare.evaluation.during_training import LengthCurve, MoreEvaluation
from flare.gpus import peak_tflops
from flare.hub import read_model_config
from flare.last_words import out_of_memory
from flare.launch import end_with_launcher, tell_launcher
from flare.logs import FILES_ONLY, log, start_logging
from flare.metrics import MetricsWriter
from flare.metrics_file import enter_stage, record_status
from flare.model import TrainingModel, checkpoint_layers, load_for_training, load_sharded
from flare.nope.format import nope_layers_of
from flare.nope.layers import format_layers
from flare.nope.load import load_tokenizer
from flare.nope.probe import verify_nope
from flare.optim import build_optimizer, build_schedule, load_optimizer_tensors
from flare.pace import multiply_as_a_layer, settle_balance
from flare.plan_table import plan_lines
from flare.prefetch import host_tensors, to_device
from flare.prepare import max_steps, packed_rows, prepare_data
from flare.progress import STOP_FILE, Progress
from flare.saving import Saver
from flare.setup import Run, check_identity
from flare.sharding import is_sharded
from flare.tensor_files import TensorReader, restore_weights
from flare.trainer import Parts, Trainer
from flare.watchdog import Limits, Watchdog


def run_worker(run: Run) -> int:
    """Train one stage on this rank. Returns 0; errors are raised, or told to the launcher that started us."""
    use_cuda = run.hardware.use_cuda
    rank = distributed.rank_from_environment()
    start_logging(rank, run.hardware.world_size)
    end_with_launcher()
    world = None
    try:
        corpus = prepare_data(run)
        rows = packed_rows(run, corpus)
        world = distributed.start(use_cuda, run.options.ddp_timeout, run.hardware.gpus)
        distress.listen(world)
        distributed.check_agreement(world, run.common_settings() | {"data": corpus.fingerprint})
        run = open_experiment(run, world)
        try:
            Session(run, world, corpus, *rows).train()
        except torch.OutOfMemoryError as error:
            raise FlareError(out_of_memory(run.plan(), world.rank, device_name(world.device), error)) from error
        finally:
            rows[0].close()
            run.experiment.unlock()
        distributed.stop()
    except FlareError as error:
        if world:
            distress.call(world)
        log.error(f"error: {error}", extra=FILES_ONLY)
        if tell_launcher(str(error), error.exit_code):
            return error.exit_code
        raise
    except Exception:
        if world and distress.heard(world):  # the rank that called says why
            return FlareError.exit_code
        if world:
            distress.call(world)
        raise
    return 0


def open_experiment(run: Run, world: World) -> Run:
    """Lock and prepare the experiment directory on rank 0; all ranks fail together if that fails."""
    experiment = run.experiment
    distributed.on_main(world, lambda: _prepare_directory(run))
    start_logging(world.rank, world.size, experiment.training_log, experiment.logs)
    if not run.init_from.exists():  # stage 1's result has just moved to stage1/
        run = replace(run, init_from=experiment.stage1 / "final_model")
    return run


def _prepare_directory(run: Run) -> None:
    experiment, options = run.experiment, run.options
    experiment.lock()
    if options.overwrite_output_dir:
        experiment.clear(options.stage)
    if options.stage == 2:
        experiment.hand_over()
    experiment.create()
    enter_stage(experiment, options.stage)
    experiment.record_command([sys.executable, str(REPO / "train_qwen_multi_gpu.py"), *run.resolved.argv])
    experiment.record_environment()
    ckpt.clean_leftovers(experiment.checkpoints)
    if options.resume == "never" and ckpt.list_checkpoints(experiment.checkpoints):
        raise ConfigError(
            f"experiment {experiment.root.name!r} has checkpoints and --resume is never; use --resume auto, "
            "another --experiment_name, or --overwrite_output_dir"
        )


class Session:
    """Model, optimizer and progress of one stage, put together and run."""

    def __init__(
        self, run: Run, world: World, corpus: Corpus | StreamedCorpus, train_rows: TrainRows, eval_rows: PackedRows
    ) -> None:
        self.run, self.world, self.corpus = run, world, corpus
        self.train_rows, self.eval_rows = train_rows, eval_rows
        self.options, self.experiment = run.options, run.experiment
        self.identity = run.identity() | {"data": corpus.fingerprint}
        self.saver = Saver(run, world, self.identity, corpus.facts, run.global_batch_size)

    def train(self) -> None:
        """From the newest checkpoint, or the start, to the end of the stage."""
        self._log_start()
        resume_from = distributed.on_main(self.world, self._find_checkpoint)
        progress = self._read_progress(resume_from)
        self._settle_length()
        if self._is_done(progress):
            log.info(
                f"stage {self.options.stage} of {self.experiment.root.name!r} is finished already (step "
                f"{progress.step}); a larger --max_steps continues it"
            )
            self.saver.record("finished", progress)
            return
        self._start_rows(progress)
        self._build(resume_from)
        self._settle_balance(resume_from, progress.rows)
        metrics = None
        if self.world.is_main:
            metrics = MetricsWriter(self.experiment, self.options.stage, self.max_steps, progress.history)
        trainer = Trainer(
            self._parts(), self.options, self.world, progress, self.saver.checkpoint, self.experiment.root, metrics
        )
        self.saver.record("running", progress, settings=self.run.settings())
        try:
            with self._watchdog() as watchdog:
                trainer.step_watch = watchdog.step
                ended = trainer.train()
            self._finish(ended, progress)
        except BaseException as error:
            self.saver.record("failed", progress, error=str(error) or type(error).__name__)
            raise
        finally:
            if metrics:
                metrics.close()

    def _watchdog(self) -> Watchdog:
        limits = Limits.of(self.options.step_timeout, self.options.ddp_timeout)
        store = self.world.store and PrefixStore("watchdog", self.world.store.clone())  # a thread's own connection
        return Watchdog(self.world.rank, self.world.size, store, limits, self.experiment.logs, self._tell_hang)

    def _tell_hang(self, message: str) -> None:
        """From the watchdog of one rank, not always the first: the main thread will never tell."""
        told = tell_launcher(message, FlareError.exit_code)
        log.error(f"error: {message}", extra=FILES_ONLY if told else {})
        record_status(self.experiment, self.options.stage, "failed", error=message)

    # -- start -------------------------------------------------------------------------------------

    def _log_start(self) -> None:
        run, options, meta = self.run, self.options, self.corpus.meta
        for warning in run.resolved.warnings:
            log.warning(warning)
        reason = run.init_reason
        for line in plan_lines(run.plan()):
            log.info(line)
        (log.warning if reason.startswith("warning") else log.info)(reason.removeprefix("warning: "))
        log.info(f"device: {self.world.size} x {device_name(self.world.device)}, precision {run.precision}")
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

    def _find_checkpoint(self) -> Checkpoint | None:
        resume = self.options.resume
        if resume not in ("auto", "never"):
            path = Path(resume)
            match = ckpt.NAME.fullmatch(path.name)
            if not match or not (path / "manifest.json").is_file():
                raise CheckpointError(f"--resume {resume} is no complete checkpoint (no manifest.json)")
            chosen = Checkpoint(path, int(match[1]))
            chosen.verify()
            return chosen
        chosen, skipped = ckpt.newest_complete(self.experiment.checkpoints)
        for reason in skipped:
            log.warning(f"skipped a damaged checkpoint: {reason}")
        if chosen is None and skipped:
            raise CheckpointError(
                f"no valid checkpoint in {self.experiment.root.name!r} ({skipped[0]}); start anew with "
                "--overwrite_output_dir"
            )
        return chosen

    def _read_progress(self, resume_from: Checkpoint | None) -> Progress:
        """Progress to go on from; refuses a checkpoint of another run."""
        if resume_from is None:
            return Progress()
        state = resume_from.state()
        reasons = {"data": what_changed(state.get("data"), self.corpus.facts)}
        check_identity(self.identity, state["identity"], resume_from.path.name, reasons)
        self._keep_global_batch(state)
        log.info(f"resumes from {resume_from.path.name}, {state['progress']['tokens']:,} tokens seen")
        self._log_changes(state["options"])
        if resume_from.path.resolve().parent == self.experiment.checkpoints.resolve():
            for name in distributed.on_main(
                self.world, lambda: ckpt.set_aside_newer(resume_from.path.parent, resume_from.step)
            ):
                log.warning(f"{name} is newer than the checkpoint to resume: renamed to superseded-{name}")
        progress = Progress(**state["progress"])
        kept = {c.step for c in ckpt.list_checkpoints(self.experiment.checkpoints)}
        if self.options.early_stopping_patience and progress.best_step not in kept:
            progress.forget_best()  # its weights were not kept: the run had no patience then
        return progress

    def _log_changes(self, then: dict) -> None:
        """Name what resumes with another value; what must not change has been refused before."""
        now = self.run.settings()
        silent = ("resume", "dry_run", "overwrite_output_dir", "experiment_name", "base_output_dir")
        changes = [f"{k} {then[k]} -> {now[k]}" for k in now if k in then and then[k] != now[k] and k not in silent]
        if changes:
            log.warning(f"resumes with changes: {', '.join(changes)}")

    def _keep_global_batch(self, state: dict) -> None:
        """The recorded global batch goes on, on any number of processes; changed flags are refused."""
        then, now = state["global_batch_size"], self.saver.global_batch_size
        if now == then:
            return
        asked_then = state.get("rows_per_process", then // state["world_size"])
        if self.saver.rows_per_process != asked_then:
            raise CheckpointError(
                f"checkpoint-{state['progress']['step']} was trained with a global batch of {then} rows, the flags "
                f"now give {now}; keep --global_batch_size {then}"
            )
        if then < self.world.size:
            raise ConfigError(f"the run's global batch of {then} rows is too small for {self.world.size} processes")
        log.info(f"{self.world.size} processes, before {state['world_size']}: the global batch stays {then} rows")
        self.saver.global_batch_size = then

    # -- parts -------------------------------------------------------------------------------------

    def _build(self, resume_from: Checkpoint | None) -> None:
        """Load weights and make the optimizer; from a checkpoint, both as they were."""
        run = self.run
        self.model = self._load_model(run.init_from, resume_from)
        if run.gradient_checkpointing:
            layers = checkpoint_layers(self.model.causal_lm)
            log.info(f"gradient checkpointing on layers {format_layers(layers)}")
        self.optimizer = build_optimizer(self.model.trainable_parameters(), self.options)
        if resume_from and resume_from.step > 0:  # before its first step Adam has no state
            reader = TensorReader.of_state(resume_from.path, "optimizer")
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
                multiply_as_a_layer(self.run.config, len(first) * self.options.max_seq_length, self.world.device)
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
        if run.parallel == "fsdp":
            log.info(f"FSDP2: weights, gradients and optimizer state are divided among {self.world.size} processes")
            return load_sharded(source, *how, self.world, documents)
        model = load_for_training(source, *how, documents)
        if resume_from:  # as fp32 masters; opened as a model they are rounded to the base's dtype
            restore_weights(model.causal_lm, TensorReader.of_model(source))
        return model.to(self.world.device)

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
        """Of all cards together, a second; None on the CPU or with a card whose peak is not known."""
        name = torch.cuda.get_device_name(self.world.device) if self.world.device.type == "cuda" else None
        peaks = [peak_tflops(name) if name else None for name in distributed.gather_objects(name)]
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
    """The card's name, or how many threads of the CPU this process uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"
