"""Which checkpoint a run goes on from, and whether it is the same run: decided before weights are loaded."""

from pathlib import Path

from flare.checkpoint import directory as ckpt
from flare.checkpoint.directory import Checkpoint
from flare.data.corpus import what_changed
from flare.distributed import process_group
from flare.errors import CheckpointError, ConfigError
from flare.logs import log
from flare.run.resolve import check_identity
from flare.run.run import Run
from flare.train.saver import Saver
from flare.train.train_state import Progress


def find_checkpoint(run: Run) -> Checkpoint | None:
    """The one that ``--resume`` names, or the newest whole one; None for a fresh start.

    Raises: CheckpointError when there are only damaged ones.
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
    chosen, skipped = ckpt.newest_complete(experiment.checkpoints)
    for reason in skipped:
        log.warning(f"skipped a damaged checkpoint: {reason}")
    if chosen is None and skipped:
        raise CheckpointError(
            f"no valid checkpoint in {experiment.root.name!r} ({skipped[0]}); start anew with --overwrite_output_dir"
        )
    return chosen


def read_progress(resume_from: Checkpoint | None, saver: Saver) -> Progress:
    """Progress to go on from; what is saved keeps the checkpoint's global batch. A collective.

    Raises: CheckpointError for a checkpoint of another run.
    """
    if resume_from is None:
        return Progress()
    run, world, state = saver.run, saver.world, resume_from.state()
    reasons = {"data": what_changed(state.get("data"), saver.data)}
    check_identity(saver.identity, state["identity"], resume_from.path.name, reasons)
    _keep_global_batch(saver, state)
    log.info(f"resumes from {resume_from.path.name}, {state['progress']['tokens']:,} tokens seen")
    _log_changes(state["options"], run.settings())
    checkpoints = run.experiment.checkpoints
    for name in process_group.on_main(world, lambda: ckpt.set_aside_newer(checkpoints, resume_from.step)):
        log.warning(f"{name} is newer than the checkpoint to resume: renamed to superseded-{name}")
    progress = Progress(**state["progress"])
    kept = {c.step for c in ckpt.list_checkpoints(checkpoints)}
    if run.options.early_stopping_patience and progress.best_step not in kept:
        progress.forget_best()  # its weights were not kept: the run had no patience then
    return progress


def _log_changes(then: dict, now: dict) -> None:
    """Name what resumes with another value; what must not change has been refused before."""
    silent = ("resume", "dry_run", "overwrite_output_dir", "experiment_name", "base_output_dir")
    changes = [f"{k} {then[k]} -> {now[k]}" for k in now if k in then and then[k] != now[k] and k not in silent]
    if changes:
        log.warning(f"resumes with changes: {', '.join(changes)}")


def _keep_global_batch(saver: Saver, state: dict) -> None:
    """The recorded global batch goes on, on any number of processes; changed flags are refused."""
    then, now, processes = state["global_batch_size"], saver.global_batch_size, saver.world.size
    if now == then:
        return
    if saver.rows_per_process != state.get("rows_per_process", then // state["world_size"]):
        raise CheckpointError(
            f"checkpoint-{state['progress']['step']} was trained with a global batch of {then} rows, the flags "
            f"now give {now}; keep --global_batch_size {then}"
        )
    if then < processes:
        raise ConfigError(f"the run's global batch of {then} rows is too small for {processes} processes")
    log.info(
        f"the global batch stays {then} rows, as this run began; the flags would give {now} on {processes} "
        f"process{'es' * (processes > 1)}"
    )
    saver.global_batch_size = then
