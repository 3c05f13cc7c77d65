"""Runs one worker process: data, process group, experiment directory, then the stage's session and its errors.

``run_worker`` is the same for one process and for many. Work for rank 0 only goes through
``process_group.run_on_main_rank``.
"""

import contextlib
import sys
from dataclasses import replace

from flare.checkpoint import directory as ckpt
from flare.distributed import peer_failure, process_group
from flare.distributed.process_group import World
from flare.errors import ConfigError, FlareError, during, first_line, is_out_of_memory, while_phase
from flare.files import REPO
from flare.launch.worker_errors import report_to_launcher, stop_when_launcher_dies
from flare.logs import FILES_ONLY, log, start_logging
from flare.plan.capacity import in_gib
from flare.plan.plan import Plan
from flare.plan.suggest import suggest
from flare.run.metrics_file import enter_stage, record_status
from flare.run.resolved_config import write_resolved_config
from flare.run.run import Run
from flare.train.prepare_data import packed_rows, prepare_data
from flare.train.session import Session, device_name


def run_worker(run: Run) -> int:
    """Train one stage on this rank. Returns the exit code; an error that no launcher can report is raised."""
    use_cuda = run.hardware.use_cuda
    rank = process_group.rank_from_environment()
    start_logging(rank, run.hardware.world_size)
    stop_when_launcher_dies()
    world = None
    try:
        corpus, *rows = _prepare(run)
        world = process_group.start(
            use_cuda, run.options.ddp_timeout, run.hardware.gpus, needs_bf16=run.precision == "bf16"
        )
        peer_failure.watch_for_failures(world)
        process_group.check_same_settings(world, run.shared_settings() | {"data": corpus.fingerprint})
        run = open_experiment(run, world)
        _train(Session(run, world, corpus, *rows))
        process_group.stop()
    except FlareError as error:
        if world:
            peer_failure.report_failure(world)
        log.error(f"error: {error}", extra=FILES_ONLY)
        if report_to_launcher(str(error), error.exit_code):
            return error.exit_code
        raise
    except Exception as error:
        if world and (
            peer_failure.another_rank_failed(world) or process_group.is_lost_peer(error)
        ):  # the failed rank, or the launcher, reports the error
            log.error(f"another rank is gone: {first_line(error)}", extra=FILES_ONLY)
            return FlareError.exit_code
        if world:
            peer_failure.report_failure(world)
        raise
    return 0


def _train(session: Session) -> None:
    """Train, and release the data and the experiment's lock in any case."""
    try:
        session.train()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _out_of_memory_error(session.run, session.world, error) from error
    finally:
        session.train_rows.close()
        session.experiment.unlock()


def _prepare(run: Run) -> tuple:
    """(corpus, training rows, held-out rows)."""
    try:
        with during("preparing the data"):
            corpus = prepare_data(run)
            return corpus, *packed_rows(run, corpus)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise FlareError(f"out of memory{while_phase()} ({first_line(error)})") from error


def _out_of_memory_error(run: Run, world: World, error: Exception) -> FlareError:
    """The error to raise. Rank 0 also writes it to training_metrics.json."""
    message = out_of_memory_message(run.plan(), world.rank, device_name(world.device), error)
    if world.is_main:
        with contextlib.suppress(OSError):
            record_status(run.experiment, run.options.stage, "failed", error=message)
    return FlareError(message)


def open_experiment(run: Run, world: World) -> Run:
    """Lock and prepare the experiment directory on rank 0. If that fails, all ranks fail."""
    experiment = run.experiment
    process_group.run_on_main_rank(world, lambda: _prepare_directory(run))
    start_logging(world.rank, world.size, experiment.training_log, experiment.logs)
    if not run.init_from.exists():  # stage 1's result has just moved to stage1/
        run = replace(run, init_from=experiment.stage1 / "final_model")
    if world.is_main:
        try:
            write_resolved_config(run)
        except OSError as error:  # only a log: the run continues
            log.warning(f"cannot write logs/resolved_config: {error}")
    return run


def _prepare_directory(run: Run) -> None:
    experiment, options = run.experiment, run.options
    experiment.lock()
    if options.overwrite_output_dir:
        experiment.clear(options.stage)
    if options.stage == 2:
        experiment.move_results_to_stage1()
    experiment.create()
    enter_stage(experiment, options.stage)
    experiment.record_command([sys.executable, str(REPO / "train_qwen_multi_gpu.py"), *run.resolved.argv])
    experiment.record_environment()
    ckpt.remove_temporary_directories(experiment.checkpoints)
    if options.resume == "never" and ckpt.list_checkpoints(experiment.checkpoints):
        raise ConfigError(
            f"experiment {experiment.root.name!r} has checkpoints and --resume is never; use --resume auto, "
            "another --experiment_name, or --overwrite_output_dir"
        )


NEEDS_LESS = 0.8
"""After running out of memory, flags are proposed that need this part of the planned peak: the plan was too low."""


def out_of_memory_message(plan: Plan, rank: int, device: str, error: Exception) -> str:
    """What ran out of memory, the plan's peak, and flags that need less memory with the same global batch."""
    need = plan.memory.peak_bytes
    reason = first_line(error.__cause__ or error).split(". GPU")[0].rstrip(".")
    return (
        f"rank {rank} ({device}) ran out of memory{while_phase()} ({reason}); the plan is {in_gib(need)} at "
        f"the peak ({plan.memory.peak_phase}); only the steps since the last checkpoint are lost; "
        f"{suggest(plan.inputs, int(NEEDS_LESS * need))}"
    )
