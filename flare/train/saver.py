"""What a session writes: checkpoints, the final model, and how it stands in training_metrics.json."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flare.checkpoint import directory as ckpt
from flare.checkpoint.directory import Checkpoint
from flare.checkpoint.tensor_files import TensorReader, restore_weights, write_pickled, write_tensors
from flare.distributed.fsdp import is_sharded
from flare.distributed.process_group import World, on_main
from flare.errors import during
from flare.files import write_json
from flare.logs import log
from flare.model.compile import uncompiled
from flare.model.training_model import TrainingModel
from flare.nope.canary.file import CANARY_FILE, Canary
from flare.nope.canary.measure import measure_canary, write_canary
from flare.nope.load import load_causal_lm
from flare.optim.optimizer import optimizer_tensors
from flare.plan.balance import Balance
from flare.run.metrics_file import record_status
from flare.run.run import Run
from flare.train.train_state import Progress


class Saver:
    """Writes one stage's results. All ranks take part, and fail together when one fails.

    Args:
        identity: what must be the same when the run is resumed.
        data: what the data is made of, to say at resume what has changed.
    """

    def __init__(self, run: Run, world: World, identity: dict, data: dict[str, str], global_batch_size: int) -> None:
        self.run, self.world = run, world
        self.identity = identity
        self.data = data
        self.global_batch_size = global_batch_size
        self.rows_per_process = global_batch_size // world.size  # as the flags say, whatever a resumed run keeps
        self.balance: Balance | None = None  # settled when the model is built
        self.max_steps = 0  # of the whole stage, settled when the global batch is
        self.model: TrainingModel | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def attach(self, model: TrainingModel, optimizer: torch.optim.Optimizer) -> None:
        """Name what is saved."""
        self.model, self.optimizer = model, optimizer

    @during("saving a checkpoint")
    def checkpoint(self, progress: Progress) -> None:
        """Write a checkpoint and prune old ones."""
        t0 = time.perf_counter()
        on_main(self.world, self.run.experiment.check_not_removed)
        directory, step = self.run.experiment.checkpoints, progress.step
        state = {"model": ckpt.model_tensors(self.model.causal_lm), "optimizer": optimizer_tensors(self.optimizer)}
        facts = {"step": step, "tokens": progress.tokens, "stage": self.run.options.stage}
        facts["world_size"] = self.world.size
        ckpt.write_checkpoint(directory / f"checkpoint-{step}", state, self._files(progress), facts, self.world)
        on_main(self.world, lambda: self._prune(progress))
        log.info(f"saved checkpoint-{step} in {time.perf_counter() - t0:.1f} s")
        self.record("running", progress)

    @during("writing final_model")
    def final_model(self, progress: Progress) -> None:
        """Write final_model: the last weights, or with early stopping the best ones evaluated."""
        on_main(self.world, self.run.experiment.check_not_removed)
        self._use_best_weights(progress)
        files = ckpt.model_files(self._config(progress), self.run.init_from)
        if is_sharded(self.model):  # no rank has the whole model: the canary is that of the files
            if self.run.nope_layers:
                files[CANARY_FILE] = lambda path: write_canary(load_causal_lm(path.parent), path.parent)
        elif canary := on_main(self.world, self._canary):
            files[CANARY_FILE] = lambda path: write_json(path, canary.as_dict())
        ckpt.export_model(self.run.experiment.final_model, self._write_weights, files, self.world)

    def _canary(self) -> Canary | None:
        with uncompiled(self.model):  # one pass of sequences of another length
            return measure_canary(self.model.causal_lm, self.saved_dtype)

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

    def _files(self, progress: Progress) -> dict[str, Callable[[Path], None]]:
        """What a checkpoint holds besides tensors."""
        state = {
            "identity": self.identity,
            "data": self.data,
            "global_batch_size": self.global_batch_size,
            "rows_per_process": self.rows_per_process,
            "world_size": self.world.size,
            "balance": self.balance.as_dict() if self.balance else None,
            "options": self.run.settings(),
            "progress": progress.as_dict(),
        }
        files = ckpt.model_files(self._config(progress), self.run.init_from)
        return files | {"trainer_state.json": lambda path: write_json(path, state)}

    def _prune(self, progress: Progress) -> None:
        options = self.run.options
        best = progress.best_step if options.early_stopping_patience else None
        ckpt.prune(self.run.experiment.checkpoints, options.save_total_limit, {progress.step, best})

    def _write_weights(self, directory: Path) -> list[Path]:
        """The weights of final_model, in the dtype and the format that they are saved in."""
        tensors, dtype = ckpt.model_tensors(self.model.causal_lm), self.saved_dtype
        if self.run.options.save_format == "bin":
            return write_pickled(tensors, directory / "pytorch_model.bin", self.world, dtype)
        return write_tensors(tensors, directory, "model", self.world, dtype)

    def _use_best_weights(self, progress: Progress) -> None:
        if not self.run.options.early_stopping_patience or progress.best_step in (None, progress.step):
            return
        path = self.run.experiment.checkpoints / f"checkpoint-{progress.best_step}"
        best = Checkpoint(path, progress.best_step)
        on_main(self.world, best.verify)
        restore_weights(self.model.causal_lm, TensorReader.of_model(best.path))
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
