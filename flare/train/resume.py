"""Finds the checkpoint to resume from and checks that it belongs to this run, before weights are loaded."""

from pathlib import Path

from flare.checkpoint import directory as ckpt
from flare.checkpoint.directory import Checkpoint
from flare.data.corpus import what_changed
from flare.distributed import process_group
from flare.distributed.process_group import World
from flare.errors import CheckpointError, ConfigError
from flare.logs import log
from flare.run.resolve import check_identity
from flare.run.run import Run
from flare.train.train_state import TrainState


def find_checkpoint(run: Run) -> Checkpoint | None:
    """The checkpoint that ``--resume`` names, or the newest complete one. None for a new run.

    Raises: CheckpointError when all checkpoints are damaged.
    """
    resume, experiment = run.options.resume, run.experiment
    if resume not in ("auto", "never"):
        path = Path(resume)
        match = ckpt.NAME.fullmatch(path.name)
        if not match:
            raise CheckpointError(f"--resume {resume} is not named checkpoint-N")
        chosen = Checkpoint(path, int(match[1]))
        chosen.verify()
        return chosen
    chosen, skipped = ckpt.newest_valid(experiment.checkpoints)
    for reason in skipped:
        log.warning(f"skipped a damaged checkpoint: {reason}")
    if chosen is None and skipped:
        raise CheckpointError(
            f"no valid checkpoint in {experiment.root.name!r} ({skipped[0]}); start again with --overwrite_output_dir"
        )
    return chosen


def read_train_state(
    resume_from: Checkpoint | None, run: Run, world: World, identity: dict, data: dict[str, str]
) -> tuple[TrainState, int]:
    """(train state to continue from, global batch size to continue with). A collective.

    Args:
        identity, data: as in ``StageFacts``.
    Raises: CheckpointError for a checkpoint of another run.
    """
    if resume_from is None:
        return TrainState(), run.global_batch_size
    content = resume_from.state()
    reasons = {"data": what_changed(content.get("data"), data)}
    check_identity(identity, content["identity"], resume_from.path.name, reasons)
    global_batch_size = _kept_global_batch_size(content, run.global_batch_size, world.size)
    log.info(f"resumes from {resume_from.path.name}, {content['progress']['tokens']:,} tokens seen")
    _log_changed_options(content["options"], run.settings())
    checkpoints = run.experiment.checkpoints
    for name in process_group.run_on_main_rank(world, lambda: ckpt.supersede_newer(checkpoints, resume_from.step)):
        log.warning(f"{name} is newer than the checkpoint to resume: renamed to superseded-{name}")
    train_state = TrainState(**content["progress"])
    kept = {c.step for c in ckpt.list_checkpoints(checkpoints)}
    if run.options.early_stopping_patience and train_state.best_step not in kept:
        train_state.forget_best()  # its weights were not kept because the run had no patience then
    return train_state, global_batch_size


def _log_changed_options(then: dict, now: dict) -> None:
    """Log the options whose value changed. Changes that are not allowed were refused before."""
    silent = ("resume", "dry_run", "overwrite_output_dir", "experiment_name", "base_output_dir")
    changes = [f"{k} {then[k]} -> {now[k]}" for k in now if k in then and then[k] != now[k] and k not in silent]
    if changes:
        log.warning(f"resumes with changes: {', '.join(changes)}")


def _kept_global_batch_size(content: dict, now: int, processes: int) -> int:
    """The checkpoint's global batch size, for any number of processes.

    Args:
        content: of the checkpoint's trainer_state.json.
        now: the global batch size according to the flags.
    Raises: CheckpointError when the flags changed, ConfigError when there are more processes than rows.
    """
    then = content["global_batch_size"]
    if now == then:
        return then
    if now // processes != content.get("rows_per_process", then // content["world_size"]):
        raise CheckpointError(
            f"checkpoint-{content['progress']['step']} was trained with a global batch of {then} rows, the flags "
            f"now give {now}; keep --global_batch_size {then}"
        )
    if then < processes:
        raise ConfigError(f"the run's global batch of {then} rows is too small for {processes} processes")
    log.info(
        f"the global batch stays {then} rows, as in the checkpoint; the flags would give {now} on {processes} "
        f"process{'es' * (processes > 1)}"
    )
    return then
