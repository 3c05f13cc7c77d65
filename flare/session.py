"""One worker's life: data, process group, experiment directory, model, resume, train, final model.

``run_worker`` is the same for one process and for many; what only rank 0 may do is marked by ``world.is_main``.
"""

import contextlib
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from flare import checkpoint as ckpt
from flare import distributed
from flare.checkpoint import Checkpoint
from flare.config import REPO
from flare.data.packing import PackedRows, split_documents
from flare.data.sources import SourceSpec, open_source
from flare.data.tokens import TokenCache, TokenSettings, build_token_cache, default_cache_dir
from flare.distributed import World
from flare.errors import CheckpointError, ConfigError, DataError, FlareError
from flare.gpus import peak_tflops
from flare.launch import TOKEN_CACHE_VARIABLE, tell_launcher
from flare.logs import log, start_logging
from flare.metrics import MetricsWriter
from flare.metrics_file import record_status
from flare.model import Trainable, checkpoint_layers, load_for_training
from flare.nope.layers import format_layers
from flare.nope.load import load_tokenizer
from flare.nope.probe import verify_nope
from flare.optim import build_optimizer, build_schedule, load_optimizer_tensors, optimizer_tensors
from flare.setup import Run, check_identity
from flare.trainer import STOP_FILE, Parts, Progress, Trainer


def prepare_data(run: Run) -> TokenCache:
    """The token cache of this run; built when missing. Call before the process group starts."""
    known = os.environ.get(TOKEN_CACHE_VARIABLE)
    if known:
        return TokenCache(Path(known))
    options = run.options
    cache_dir = default_cache_dir(options.cache_dir)
    if options.preprocessing_num_workers:
        os.environ["RAYON_NUM_THREADS"] = str(options.preprocessing_num_workers)
    spec = SourceSpec(
        options.dataset_name,
        options.text_column,
        options.dataset_config,
        options.dataset_split,
        options.cache_dir,
    )
    tokenizer = load_tokenizer(run.init_from)
    rows = int(run.config["vocab_size"])
    if len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer of {run.init_from} has {len(tokenizer)} ids but the embedding {rows} rows; they do not "
            "belong together"
        )
    settings = TokenSettings(options.dataset_size, options.max_bad_rows)
    return build_token_cache(open_source(spec, cache_dir), tokenizer, cache_dir, settings)


def packed_rows(run: Run, cache: TokenCache) -> tuple[PackedRows, PackedRows]:
    """(training rows, held-out rows).

    Raises: DataError when the data gives fewer tokens than one step.
    """
    options = run.options
    train, held_out = split_documents(cache.hashes, options.validation_split_percentage)
    train_rows = PackedRows(cache, train, options.max_seq_length, options.packing)
    eval_rows = PackedRows(cache, held_out, options.max_seq_length, options.packing, keep_last=True)
    if len(train_rows) < run.global_batch_size:
        raise DataError(
            f"the data gives {train_rows.num_tokens:,} training tokens, one step needs "
            f"{run.global_batch_size * options.max_seq_length + 1:,}; lower --max_seq_length or the batch size"
        )
    return train_rows, eval_rows


def max_steps(run: Run, train_rows: PackedRows) -> int:
    """Steps of the run: ``--max_steps``, or what ``--num_train_epochs`` comes to."""
    options = run.options
    if options.num_train_epochs is not None:
        return math.ceil(options.num_train_epochs * len(train_rows) / run.global_batch_size)
    return options.max_steps


def run_worker(run: Run) -> int:
    """Train one stage on this rank. Returns 0; errors are raised, or told to the launcher that started us."""
    use_cuda = run.hardware.use_cuda
    try:
        cache = prepare_data(run)
        rows = packed_rows(run, cache)
        world = distributed.start(use_cuda, run.options.ddp_timeout)
        run = open_experiment(run, world)
        try:
            Session(run, world, cache, *rows).train()
        finally:
            run.experiment.unlock()
        distributed.stop()
    except FlareError as error:
        log.error(f"error: {error}") if log.handlers else None
        if tell_launcher(str(error), error.exit_code):
            return error.exit_code
        raise
    return 0


def open_experiment(run: Run, world: World) -> Run:
    """Lock and prepare the experiment directory on rank 0; all ranks fail together if that fails."""
    experiment, options = run.experiment, run.options
    failure: BaseException | None = None
    if world.is_main:
        try:
            experiment.lock()
            _prepare_directory(run)
        except FlareError as error:
            failure = error
    distributed.rethrow_first(failure)
    start_logging(world.rank, world.size, experiment.training_log, experiment.logs)
    if not run.init_from.exists():  # stage 1's result has just moved to stage1/
        run = replace(run, init_from=experiment.stage1 / "final_model")
    if world.is_main:
        experiment.record_command(
            [sys.executable, str(REPO / "train_qwen_multi_gpu.py"), *run.resolved.argv], {}
        )
        experiment.record_environment()
        record_status(experiment, options.stage, "running", settings=run.settings())
    return run


def _prepare_directory(run: Run) -> None:
    experiment, options = run.experiment, run.options
    if options.overwrite_output_dir:
        experiment.clear(options.stage)
    if options.stage == 2:
        experiment.hand_over()
    experiment.create()
    ckpt.clean_leftovers(experiment.checkpoints)
    if options.resume == "never" and ckpt.list_checkpoints(experiment.checkpoints):
        raise ConfigError(
            f"experiment {experiment.root.name!r} has checkpoints and --resume is never; use --resume auto, "
            "another --experiment_name, or --overwrite_output_dir"
        )


class Session:
    """Model, optimizer and progress of one stage, put together and run."""

    def __init__(
        self, run: Run, world: World, cache: TokenCache, train_rows: PackedRows, eval_rows: PackedRows
    ) -> None:
        self.run, self.world, self.cache = run, world, cache
        self.train_rows, self.eval_rows = train_rows, eval_rows
        self.options, self.experiment = run.options, run.experiment
        self.identity = run.identity() | {"data": cache.fingerprint}
        self.trainable = Trainable.parse(
            self.options.train_layers, self.options.stage, list(run.nope_layers), run.depth
        )
        self.max_steps = max_steps(run, train_rows)
        self.global_batch_size = run.global_batch_size

    def train(self) -> None:
        """From the newest checkpoint, or the start, to the end of the stage."""
        self._log_start()
        resume_from = self._choose_checkpoint()
        progress = self._read_progress(resume_from)
        if progress.step >= self.max_steps and self.experiment.final_model.exists():
            log.info(
                f"stage {self.options.stage} of {self.experiment.root.name!r} is finished already (step "
                f"{progress.step}); a larger --max_steps continues it"
            )
            self._record("finished", progress)
            return
        self._build(resume_from)
        metrics = None
        if self.world.is_main:
            metrics = MetricsWriter(self.experiment, self.options.stage, self.max_steps, progress.history)
        trainer = Trainer(
            self._parts(), self.options, self.world, progress, self._save, self.experiment.root, metrics
        )
        try:
            ended = trainer.train()
            self._finish(ended, progress)
        except BaseException as error:
            self._record("failed", progress, error=str(error) or type(error).__name__)
            raise
        finally:
            if metrics:
                metrics.close()

    # -- start -------------------------------------------------------------------------------------

    def _log_start(self) -> None:
        run, options, meta = self.run, self.options, self.cache.meta
        for warning in run.resolved.warnings:
            log.warning(warning)
        reason = run.init_reason
        (log.warning if reason.startswith("warning") else log.info)(reason.removeprefix("warning: "))
        log.info(f"device: {self.world.size} x {device_name(self.world.device)}, precision {run.precision}")
        log.info(
            f"NoPE layers: {format_layers(list(run.nope_layers))} of {run.depth}; trains: {self.trainable}"
        )
        log.info(
            f"data: {options.dataset_name}, documents end with {meta['end_of_text']} ({meta['end_of_text_id']}); "
            f"train {self.train_rows.num_documents:,} documents, {self.train_rows.num_tokens:,} tokens, "
            f"{len(self.train_rows):,} rows; held out {self.eval_rows.num_documents:,} documents, "
            f"{self.eval_rows.num_tokens:,} tokens"
        )
        log.info(
            f"{self.max_steps} steps of {self.global_batch_size} rows x {options.max_seq_length} tokens = "
            f"{self.global_batch_size * options.max_seq_length:,} tokens a step"
        )

    def _choose_checkpoint(self) -> Checkpoint | None:
        """Rank 0 verifies and chooses, all ranks follow."""
        chosen: Checkpoint | None = None
        failure: BaseException | None = None
        if self.world.is_main:
            try:
                chosen = self._find_checkpoint()
            except FlareError as error:
                failure = error
        distributed.rethrow_first(failure)
        return distributed.gather_objects(chosen)[0]

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
        check_identity(self.identity, state["identity"], resume_from.path.name)
        self._keep_global_batch(state)
        log.info(f"resumes from {resume_from.path.name}, {state['progress']['tokens']:,} tokens seen")
        return Progress(**state["progress"])

    def _keep_global_batch(self, state: dict) -> None:
        """The recorded global batch goes on, on any number of processes; changed flags are refused."""
        then, now = state["global_batch_size"], self.global_batch_size
        if now == then:
            return
        per_process = [now // self.world.size, then // state["world_size"]]
        if per_process[0] != per_process[1] or self.world.size == state["world_size"]:
            raise CheckpointError(
                f"checkpoint-{state['progress']['step']} was trained with a global batch of {then} rows, the flags "
                f"now give {now}; keep --global_batch_size {then}"
            )
        if then < self.world.size:
            raise ConfigError(
                f"the run's global batch of {then} rows is too small for {self.world.size} processes"
            )
        log.info(f"{state['world_size']} -> {self.world.size} processes: the global batch stays {then} rows")
        self.global_batch_size = then

    # -- parts -------------------------------------------------------------------------------------

    def _build(self, resume_from: Checkpoint | None) -> None:
        """Load weights and make the optimizer; from a checkpoint, both as they were."""
        run = self.run
        source = resume_from.path if resume_from else run.init_from
        self.model = load_for_training(
            source, run.config, self.trainable, run.precision, self.options.attn_implementation
        )
        if resume_from:
            ckpt.restore_weights(self.model.causal_lm, resume_from.path / "model.safetensors")
        if self.options.gradient_checkpointing:
            layers = checkpoint_layers(self.model.causal_lm)
            log.info(f"gradient checkpointing on layers {format_layers(layers)}")
        self.model.to(self.world.device)
        self.optimizer = build_optimizer(self.model.trainable_parameters(), self.options)
        if resume_from:
            tensors = ckpt.load_tensors(resume_from.path / "optimizer.safetensors")
            try:
                load_optimizer_tensors(self.optimizer, tensors)
            except KeyError as error:
                raise CheckpointError(
                    f"{resume_from.path.name}: optimizer state is incomplete: {error}"
                ) from error
        counts = [0, 0]
        for parameter in self.model.causal_lm.parameters():
            counts[parameter.requires_grad] += parameter.numel()
        log.info(f"parameters: {counts[1]:,} trainable, {counts[0]:,} frozen")
        found = verify_nope(self.model.causal_lm, list(run.nope_layers))
        log.info(f"NoPE layers proven from attention outputs: {format_layers(found)}")

    def _parts(self) -> Parts:
        name = device_name(self.world.device)
        peak = peak_tflops(name) if self.world.device.type == "cuda" else None
        return Parts(
            model=self.model,
            optimizer=self.optimizer,
            schedule=build_schedule(self.options, self.max_steps),
            train_rows=self.train_rows,
            eval_rows=self.eval_rows,
            max_steps=self.max_steps,
            global_batch_size=self.global_batch_size,
            flops_per_token=6.0 * sum(p.numel() for p in self.model.causal_lm.parameters()),
            peak_flops=peak * 1e12 * self.world.size if peak else None,
        )

    # -- save and end --------------------------------------------------------------------------------

    def _config(self, progress: Progress) -> dict:
        """config.json of what is written: the model plus where it came from."""
        dtype = str(self.saved_dtype).removeprefix("torch.")
        past = (self.run.config.get("flare") or {}).get("trained_tokens", 0)
        facts = {"stage": self.options.stage, "trained_tokens": past + progress.tokens}
        return self.run.config | {"dtype": dtype, "flare": facts}

    @property
    def saved_dtype(self) -> torch.dtype:
        """Weights of final_model: as the base has them, fp32 on fp32 runs."""
        stored = self.run.config.get("dtype") or self.run.config.get("torch_dtype") or "float32"
        return torch.float32 if self.run.precision == "fp32" else getattr(torch, stored)

    def _save(self, progress: Progress) -> None:
        """Write a checkpoint on rank 0; all ranks wait, and fail together when it fails."""
        failure: BaseException | None = None
        if self.world.is_main:
            try:
                self._write_checkpoint(progress)
            except FlareError as error:
                failure = error
        distributed.rethrow_first(failure)

    def _write_checkpoint(self, progress: Progress) -> None:
        t0 = time.perf_counter()
        causal_lm = self.model.causal_lm
        state = {
            "identity": self.identity,
            "global_batch_size": self.global_batch_size,
            "world_size": self.world.size,
            "progress": progress.as_dict(),
        }
        weights = ckpt.model_tensors(causal_lm)
        files = ckpt.model_files(
            causal_lm,
            self._config(progress),
            self.run.init_from,
            lambda path: ckpt.save_tensors(weights, path),
            "model.safetensors",
        )
        files["optimizer.safetensors"] = lambda path: ckpt.save_tensors(
            optimizer_tensors(self.optimizer), path
        )
        files["trainer_state.json"] = lambda path: ckpt.write_json(path, state)
        facts = {"stage": self.options.stage, "tokens": progress.tokens, "world_size": self.world.size}
        written = ckpt.write_checkpoint(self.experiment.checkpoints, progress.step, files, facts)
        best = progress.best_step if self.options.early_stopping_patience else None
        ckpt.prune(self.experiment.checkpoints, self.options.save_total_limit, best)
        log.info(f"saved {written.path.name} in {time.perf_counter() - t0:.1f} s")
        self._record("running", progress)

    def _finish(self, ended: str, progress: Progress) -> None:
        """Final model and status, or the status of a clean stop."""
        if ended == "stopped":
            if self.world.is_main:
                (self.experiment.root / STOP_FILE).unlink(missing_ok=True)
            log.info(f"stopped at step {progress.step}; the same command continues")
            self._record("stopped", progress)
            return
        failure: BaseException | None = None
        if self.world.is_main:
            try:
                self._use_best_weights(progress)
                self._export(progress)
            except FlareError as error:
                failure = error
        distributed.rethrow_first(failure)
        warnings = len(self.run.resolved.warnings)
        log.info(
            f"finished stage {self.options.stage} at step {progress.step}"
            f"{' (early stop)' if ended == 'early_stopped' else ''}: 0 errors, {warnings} warnings; "
            f"final model: {self.experiment.final_model}"
        )
        self._record("finished", progress, early_stopped=ended == "early_stopped")

    def _use_best_weights(self, progress: Progress) -> None:
        """With early stopping the final model is the best one evaluated, not the last."""
        if not self.options.early_stopping_patience or progress.best_step in (None, progress.step):
            return
        best = Checkpoint(
            self.experiment.checkpoints / f"checkpoint-{progress.best_step}", progress.best_step
        )
        best.verify()
        ckpt.restore_weights(self.model.causal_lm, best.path / "model.safetensors")
        log.info(f"final model: the weights of step {best.step} (eval loss {progress.best_loss:.4f})")

    def _export(self, progress: Progress) -> None:
        tensors = ckpt.model_tensors(self.model.causal_lm, self.saved_dtype)
        if self.options.save_format == "bin":
            name, write = "pytorch_model.bin", lambda path: torch.save(tensors, path)
        else:
            name, write = "model.safetensors", lambda path: ckpt.save_tensors(tensors, path)
        files = ckpt.model_files(
            self.model.causal_lm, self._config(progress), self.run.init_from, write, name
        )
        ckpt.export_model(self.experiment.final_model, files)

    def _record(self, status: str, progress: Progress, **facts: object) -> None:
        if not self.world.is_main:
            return
        totals = {"steps": progress.step, "tokens": progress.tokens, "max_steps": self.max_steps}
        best = {"step": progress.best_step, "eval_loss": progress.best_loss}
        with contextlib.suppress(OSError):  # a full disk must not hide the error that is being recorded
            record_status(
                self.experiment, self.options.stage, status,
                totals=totals, best=best, history=progress.history, **facts,
            )  # fmt: skip


def device_name(device: torch.device) -> str:
    """The card's name, or how many threads of the CPU this process uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"
