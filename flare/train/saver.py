"""Writes the checkpoints and the final model of a stage."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from flare.checkpoint import directory as ckpt
from flare.checkpoint.directory import Checkpoint
from flare.checkpoint.tensor_files import TensorReader, restore_weights, write_pickled, write_tensors
from flare.distributed.fsdp import is_sharded
from flare.distributed.process_group import World, run_on_main_rank
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
from flare.run.run import Run
from flare.train.stage_facts import StageFacts
from flare.train.train_state import TrainState


class Saver:
    """Writes one stage's results. Every method is a collective: if one rank fails, all ranks fail.

    Args:
        balance: rows of each rank. A resumed run reuses it.
    """

    def __init__(
        self,
        run: Run,
        world: World,
        facts: StageFacts,
        balance: Balance,
        model: TrainingModel,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.run, self.world, self.facts = run, world, facts
        self.balance = balance
        self.model, self.optimizer = model, optimizer

    @during("saving a checkpoint")
    def checkpoint(self, train_state: TrainState) -> None:
        """Write a checkpoint and delete old ones."""
        t0 = time.perf_counter()
        run_on_main_rank(self.world, self.run.experiment.check_not_removed)
        directory, step = self.run.experiment.checkpoints, train_state.step
        tensors = {"model": ckpt.model_tensors(self.model.causal_lm), "optimizer": optimizer_tensors(self.optimizer)}
        manifest = {"step": step, "tokens": train_state.tokens, "stage": self.run.options.stage}
        manifest["world_size"] = self.world.size
        files = self._checkpoint_files(train_state)
        ckpt.write_checkpoint(directory / f"checkpoint-{step}", tensors, files, manifest, self.world)
        run_on_main_rank(self.world, lambda: self._prune(train_state))
        log.info(f"saved checkpoint-{step} in {time.perf_counter() - t0:.1f} s")

    @during("writing final_model")
    def final_model(self, train_state: TrainState) -> None:
        """Write final_model: the last weights, or with early stopping the weights of the best evaluation."""
        run_on_main_rank(self.world, self.run.experiment.check_not_removed)
        self._load_best_weights(train_state)
        files = ckpt.model_files(self._config(train_state), self.run.init_from)
        if is_sharded(self.model):  # no rank has the complete model: the canary is measured on the written files
            if self.run.nope_layers:
                files[CANARY_FILE] = lambda path: write_canary(load_causal_lm(path.parent), path.parent)
        elif canary := run_on_main_rank(self.world, self._canary):
            files[CANARY_FILE] = lambda path: write_json(path, canary.as_dict())
        ckpt.export_model(self.run.experiment.final_model, self._write_weights, files, self.world)

    def _canary(self) -> Canary | None:
        with uncompiled(self.model):  # a single pass with another sequence length
            return measure_canary(self.model.causal_lm, self.saved_dtype)

    def _checkpoint_files(self, train_state: TrainState) -> dict[str, Callable[[Path], None]]:
        """The files of a checkpoint besides tensors, each with the function that writes it."""
        content = {
            "identity": self.facts.identity,
            "data": self.facts.data,
            "global_batch_size": self.facts.global_batch_size,
            "rows_per_process": self.facts.rows_per_process,
            "world_size": self.world.size,
            "balance": self.balance.as_dict(),
            "options": self.run.settings(),
            "progress": train_state.as_dict(),
        }
        files = ckpt.model_files(self._config(train_state), self.run.init_from)
        return files | {"trainer_state.json": lambda path: write_json(path, content)}

    def _prune(self, train_state: TrainState) -> None:
        options = self.run.options
        best = train_state.best_step if options.early_stopping_patience else None
        ckpt.prune(self.run.experiment.checkpoints, options.save_total_limit, {train_state.step, best})

    def _write_weights(self, directory: Path) -> list[Path]:
        """Write the weights of final_model in their dtype and file format."""
        tensors, dtype = ckpt.model_tensors(self.model.causal_lm), self.saved_dtype
        if self.run.options.save_format == "bin":
            return write_pickled(tensors, directory / "pytorch_model.bin", self.world, dtype)
        return write_tensors(tensors, directory, "model", self.world, dtype)

    def _load_best_weights(self, train_state: TrainState) -> None:
        if not self.run.options.early_stopping_patience or train_state.best_step in (None, train_state.step):
            return
        path = self.run.experiment.checkpoints / f"checkpoint-{train_state.best_step}"
        best = Checkpoint(path, train_state.best_step)
        run_on_main_rank(self.world, best.verify)
        restore_weights(self.model.causal_lm, TensorReader.of_model(best.path))
        log.info(f"final model: the weights of step {best.step} (eval loss {train_state.best_loss:.4f})")

    def _config(self, train_state: TrainState) -> dict:
        """The model's config.json, with the stage, step and tokens it was trained for."""
        dtype = str(self.saved_dtype).removeprefix("torch.")
        earlier_tokens = (self.run.config.get("flare") or {}).get("trained_tokens", 0)
        trained = {
            "stage": self.run.options.stage,
            "step": train_state.step,
            "trained_tokens": earlier_tokens + train_state.tokens,
        }
        return self.run.config | {"dtype": dtype, "flare": trained}

    @property
    def saved_dtype(self) -> torch.dtype:
        """dtype of final_model's weights: that of the base model, or fp32 in an fp32 run."""
        stored = self.run.config.get("dtype") or self.run.config.get("torch_dtype") or "float32"
        return torch.float32 if self.run.precision == "fp32" else getattr(torch, stored)
