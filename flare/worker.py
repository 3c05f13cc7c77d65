"""One worker's life: data, process group, experiment directory, then the stage's session, and how it ends.

``run_worker`` is the same for one process and for many; what only rank 0 may do goes through
``distributed.on_main``.
"""

import contextlib
import sys
from dataclasses import replace

from flare import checkpoint as ckpt
from flare import distress, distributed
from flare.config import REPO
from flare.distributed import World
from flare.errors import ConfigError, FlareError, first_line
from flare.last_words import out_of_memory
from flare.logs import FILES_ONLY, log, start_logging
from flare.metrics_file import enter_stage, record_status
from flare.phase import during, is_out_of_memory, while_phase
from flare.prepare import packed_rows, prepare_data
from flare.resolved_config import write_resolved_config
from flare.run import Run
from flare.session import Session, device_name
from flare.worker_errors import end_with_launcher, tell_launcher


def run_worker(run: Run) -> int:
    """Train one stage on this rank. Returns 0; errors are raised, or told to the launcher that started us."""
    use_cuda = run.hardware.use_cuda
    rank = distributed.rank_from_environment()
    start_logging(rank, run.hardware.world_size)
    end_with_launcher()
    world = None
    try:
        corpus, *rows = _prepared(run)
        world = distributed.start(
            use_cuda, run.options.ddp_timeout, run.hardware.gpus, needs_bf16=run.precision == "bf16"
        )
        distress.listen(world)
        distributed.check_agreement(world, run.common_settings() | {"data": corpus.fingerprint})
        run = open_experiment(run, world)
        try:
            Session(run, world, corpus, *rows).train()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise _last_words(run, world, error) from error
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
    except Exception as error:
        if world and (distress.heard(world) or distributed.is_lost_peer(error)):  # told by who called, or the launcher
            log.error(f"another rank is gone: {first_line(error)}", extra=FILES_ONLY)
            return FlareError.exit_code
        if world:
            distress.call(world)
        raise
    return 0


def _prepared(run: Run) -> tuple:
    """(corpus, training rows, held-out rows)."""
    try:
        with during("preparing the data"):
            corpus = prepare_data(run)
            return corpus, *packed_rows(run, corpus)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise FlareError(f"out of memory{while_phase()} ({first_line(error)})") from error


def _last_words(run: Run, world: World, error: Exception) -> FlareError:
    """What to say of memory that was short; on rank 0 it is how the stage ended, too."""
    message = out_of_memory(run.plan(), world.rank, device_name(world.device), error)
    if world.is_main:
        with contextlib.suppress(OSError):
            record_status(run.experiment, run.options.stage, "failed", error=message)
    return FlareError(message)


def open_experiment(run: Run, world: World) -> Run:
    """Lock and prepare the experiment directory on rank 0; all ranks fail together if that fails."""
    experiment = run.experiment
    distributed.on_main(world, lambda: _prepare_directory(run))
    start_logging(world.rank, world.size, experiment.training_log, experiment.logs)
    if not run.init_from.exists():  # stage 1's result has just moved to stage1/
        run = replace(run, init_from=experiment.stage1 / "final_model")
    if world.is_main:
        try:
            write_resolved_config(run)
        except OSError as error:  # a log, worth less than the run
            log.warning(f"cannot write logs/resolved_config: {error}")
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
