"""What a session writes: checkpoints, the final model, and how it stands in training_metrics.json."""

import contextlib
import time

import torch

from flare import checkpoint as ckpt
from flare.balance import Balance
from flare.checkpoint import Checkpoint
from flare.distributed import World, on_main
from flare.files import write_json
from flare.logs import log
from flare.metrics_file import record_status
from flare.model import TrainingModel
from flare.nope.canary import measure_canary
from flare.nope.canary_file import CANARY_FILE
from flare.optim import optimizer_tensors
from flare.progress import Progress
from flare.setup import Run


class Saver:
    """Writes one stage's results. Rank 0 writes, all ranks wait, and fail together when it fails.

    Args:
        identity: what must be the same when the run is resumed.
    """

    def __init__(self, run: Run, world: World, identity: dict, global_batch_size: int) -> None:
        self.run, self.world = run, world
        self.identity = identity
        self.global_batch_size = global_batch_size
        self.balance: Balance | None = None  # settled when the model is built
        self.max_steps = 0  # of the whole stage, settled when the global batch is
        self.model: TrainingModel | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def attach(self, model: TrainingModel, optimizer: torch.optim.Optimizer) -> None:
        """Name what is saved."""
        self.model, self.optimizer = model, optimizer

    def checkpoint(self, progress: Progress) -> None:
        """Write a checkpoint and prune old ones."""
        on_main(self.world, lambda: self._write_checkpoint(progress))

    def final_model(self, progress: Progress) -> None:
        """Write final_model: the last weights, or with early stopping the best ones evaluated."""
        on_main(self.world, lambda: self._export(progress))

    def record(self, status: str, progress: Progress, **facts: object) -> None:
        """Write how the stage stands."""
        if not self.world.is_main:
            return
        totals = {"steps": progress.step, "tokens": progress.tokens, "max_steps": self.max_steps}
        facts |= {"best": {"step": progress.best_step, "eval_loss": progress.best_loss}}
        with contextlib.suppress(OSError):  # a full disk must not hide the error that is being recorded
            record_status(
                self.run.experiment, self.run.options.stage, status,
                totals=totals, history=progress.history, **facts,
            )  # fmt: skip

    def _write_checkpoint(self, progress: Progress) -> None:
        t0 = time.perf_counter()
        options, checkpoints = self.run.options, self.run.experiment.checkpoints
        state = {
            "identity": self.identity,
            "global_batch_size": self.global_batch_size,
            "world_size": self.world.size,
            "balance": self.balance.as_dict() if self.balance else None,
            "options": self.run.settings(),
            "progress": progress.as_dict(),
        }
        weights = ckpt.model_tensors(self.model.causal_lm)
        files = ckpt.model_files(
            self._config(progress), self.run.init_from, "model.safetensors", lambda p: ckpt.save_tensors(weights, p)
        )
        files["optimizer.safetensors"] = lambda path: ckpt.save_tensors(optimizer_tensors(self.optimizer), path)
        files["trainer_state.json"] = lambda path: write_json(path, state)
        facts = {"stage": options.stage, "tokens": progress.tokens, "world_size": self.world.size}
        written = ckpt.write_checkpoint(checkpoints, progress.step, files, facts)
        best = progress.best_step if options.early_stopping_patience else None
        ckpt.prune(checkpoints, options.save_total_limit, {progress.step, best})
        log.info(f"saved {written.path.name} in {time.perf_counter() - t0:.1f} s")
        self.record("running", progress)

    def _export(self, progress: Progress) -> None:
        self._use_best_weights(progress)
        tensors = ckpt.model_tensors(self.model.causal_lm, self.saved_dtype)
        if self.run.options.save_format == "bin":
            name, write = "pytorch_model.bin", lambda path: torch.save(tensors, path)
        else:
            name, write = "model.safetensors", lambda path: ckpt.save_tensors(tensors, path)
        files = ckpt.model_files(self._config(progress), self.run.init_from, name, write)
        canary = measure_canary(self.model.causal_lm, self.saved_dtype)
        if canary:
            files[CANARY_FILE] = lambda path: write_json(path, canary.as_dict())
        ckpt.export_model(self.run.experiment.final_model, files)

    def _use_best_weights(self, progress: Progress) -> None:
        if not self.run.options.early_stopping_patience or progress.best_step in (None, progress.step):
            return
        path = self.run.experiment.checkpoints / f"checkpoint-{progress.best_step}"
        best = Checkpoint(path, progress.best_step)
        best.verify()
        ckpt.restore_weights(self.model.causal_lm, best.path / "model.safetensors")
        log.info(f"final model: the weights of step {best.step} (eval loss {progress.best_loss:.4f})")

    def _config(self, progress: Progress) -> dict:
        """config.json of what is written: the model, plus how far it was trained."""
        dtype = str(self.saved_dtype).removeprefix("torch.")
        past = (self.run.config.get("flare") or {}).get("trained_tokens", 0)
        facts = {"stage": self.run.options.stage, "step": progress.step, "trained_tokens": past + progress.tokens}
        return self.run.config | {"dtype": dtype, "flare": facts}

    @property
    def saved_dtype(self) -> torch.dtype:
        """Weights of final_model: as the base has them, fp32 on fp32 runs."""
        stored = self.run.config.get("dtype") or self.run.config.get("torch_dtype") or "float32"
        return torch.float32 if self.run.precision == "fp32" else getattr(torch, stored)
