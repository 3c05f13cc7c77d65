"""Flare's trainer without an experiment, for benchmarks and tests. It does not resume and does not save."""

from collections.abc import Sequence
from pathlib import Path

from flare.config.options import Options
from flare.data.training_rows import TrainRows
from flare.distributed.process_group import World
from flare.model.training_model import TrainingModel
from flare.optim.lr_schedule import build_schedule
from flare.optim.optimizer import build_optimizer
from flare.train.components import Callbacks, Components
from flare.train.train_state import TrainState
from flare.train.trainer import Trainer


def bare_trainer(
    model: TrainingModel,
    rows: TrainRows,
    options: Options,
    world: World,
    rows_by_rank: Sequence[int],
    stop_dir: Path,
    train_state: TrainState | None = None,
) -> Trainer:
    """A trainer that reads and evaluates the same rows, to ``options.max_steps``.

    Args:
        rows_by_rank: of each step; together they are the global batch.
        stop_dir: where a file ``STOP`` would end it; nothing is written there.
        train_state: where training starts; at step 0 when None.
    """
    components = Components(
        model=model,
        optimizer=build_optimizer(model.trainable_parameters(), options),
        schedule=build_schedule(options, options.max_steps),
        train_rows=rows,
        eval_rows=rows,
        max_steps=options.max_steps,
        global_batch_size=sum(rows_by_rank),
        rows_by_rank=rows_by_rank,
    )
    return Trainer(components, options, world, train_state or TrainState(), Callbacks(), stop_dir)
