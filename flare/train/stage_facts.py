"""The facts of a stage that stay fixed while it trains, and its status in training_metrics.json."""

import contextlib
from dataclasses import dataclass

from flare.distributed.process_group import World
from flare.run.metrics_file import record_status
from flare.run.run import Run
from flare.train.train_state import TrainState


@dataclass(frozen=True)
class StageFacts:
    """Facts that are resolved once, after the checkpoint to resume from has been read and before the model is built.

    Args:
        identity: what must be the same when the run is resumed.
        data: what the data consists of. A refused resume uses it to name what has changed.
        global_batch_size: rows of a step. A resumed run keeps the checkpoint's number.
        rows_per_process: rows of a step for each process according to the flags, also in a resumed run.
        max_steps: steps of the complete stage.
    """

    identity: dict
    data: dict[str, str]
    global_batch_size: int
    rows_per_process: int
    max_steps: int


@dataclass(frozen=True)
class StageStatus:
    """Writes the status of a stage (running, stopped, finished, failed). Other ranks than rank 0 write nothing."""

    run: Run
    world: World
    max_steps: int

    def record(self, status: str, state: TrainState, **more: object) -> None:
        """Write the status, how far training has come, and ``more`` keys."""
        if not self.world.is_main:
            return
        totals = {"steps": state.step, "tokens": state.tokens, "max_steps": self.max_steps}
        more |= {"best": {"step": state.best_step, "eval_loss": state.best_loss}}
        with contextlib.suppress(OSError):  # a full disk must not hide the error that is being recorded
            record_status(
                self.run.experiment, self.run.options.stage, status, totals=totals, history=state.history, **more
            )
