"""Start workers on this host through torchrun's API, and say truly how they ended.

A single process needs no launcher and runs in this one. For several, torchrun's agent starts the script
again, once a rank; it passes signals on, and its workers' first error is shown once, with its exit code.
"""

import contextlib
import itertools
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from flare.config.parse import ResolvedOptions
from flare.errors import FlareError, print_error
from flare.gpus.selection import Selection, select_environment
from flare.launch.agent import kill_workers, received_signal, run_agent
from flare.launch.nodes import master, node_rank, num_nodes
from flare.launch.worker_environment import DEVICE_VARIABLE
from flare.launch.worker_errors import first_failure
from flare.run.experiment import Experiment
from flare.run.metrics_file import record_status
from flare.run.run import Run

RECORD_WAIT_SEC = 10.0
"""How long another host's launcher waits for the first one's rank 0 to record how the run ended."""


def shell_command(script: Path, run: Run, selection: Selection | None) -> str:
    """The torchrun command that does what the launcher does, to read or to paste."""
    argv = _without_dry_run(run.resolved.argv)
    if run.resolved.name_is_default:  # else each worker would take its own time for the name
        argv += ["--experiment_name", run.options.experiment_name]
    variables = select_environment(selection) if selection else {DEVICE_VARIABLE: "cpu"}
    local = run.hardware.world_size // num_nodes()
    start = ["torchrun", "--standalone", f"--nproc_per_node={local}"]
    if num_nodes() > 1:
        address, port = master()
        start = [
            "torchrun", f"--nnodes={num_nodes()}", f"--node_rank={node_rank()}", f"--master_addr={address}",
            f"--master_port={port}", f"--nproc_per_node={local}",
        ]  # fmt: skip
    prefix = "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items())
    return prefix + shlex.join([*start, str(script), *argv])


def _without_dry_run(argv: list[str]) -> list[str]:
    """The command line without the flag, in whichever way it is written: alone, with a value, with ``=``."""
    kept: list[str] = []
    before = ""
    for word in argv:
        is_value = before == "--dry_run" and not word.startswith("-")
        if word.partition("=")[0] != "--dry_run" and not is_value:
            kept.append(word)
        before = word
    return kept


@contextlib.contextmanager
def reserved_experiment_name(resolved: ResolvedOptions) -> Iterator[ResolvedOptions]:
    """A default name that is this launch's alone: of two in one second the later gets ``_2``.

    The directory is made here, and removed again if nothing was written into it.
    """
    if not resolved.name_is_default:
        yield resolved
        return
    first = resolved.options.experiment_dir
    for number in itertools.count(1):
        root = first if number == 1 else first.with_name(f"{first.name}_{number}")
        try:
            root.mkdir(parents=True)
            break
        except FileExistsError:
            continue
    try:
        yield resolved.with_experiment_name(root.name)
    finally:
        with contextlib.suppress(OSError):
            root.rmdir()


def start_workers(script: Path, run: Run) -> int:
    """Train in one process a rank through torchrun's agent; returns the exit code.

    0 also for a clean stop on a signal, which torchrun itself would call a failure.

    Raises: EnvError when this host does not meet the others.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    experiment, stage = run.experiment, run.options.stage
    logs = DefaultLogsSpecs()
    try:
        run_agent(script, run.resolved.argv, run.hardware.world_size // num_nodes(), logs)
    except SignalException as error:
        if _ended_cleanly(experiment, stage):
            return 0
        kill_workers()  # that are left when another signal came while they were waited for: the third one
        _record_failure(experiment, stage, f"ended by signal {received_signal(error).name}")
        return 128 + received_signal(error)
    except ChildFailedError as error:
        return _report_failure(error, Path(logs.root_log_dir), experiment, stage)
    return 0


def _ended_cleanly(experiment: Experiment, stage: int) -> bool:
    """Whether the workers recorded a clean end. The first host's rank 0 does; others may have to wait for it."""
    deadline = time.monotonic() + (0 if node_rank() == 0 else RECORD_WAIT_SEC)
    while True:
        status = experiment.read_metrics().get("stages", {}).get(str(stage), {}).get("status")
        if status in ("stopped", "finished") or time.monotonic() > deadline:
            return status in ("stopped", "finished")
        time.sleep(0.2)


def _report_failure(error: object, workers_files: Path, experiment: Experiment, stage: int) -> int:
    """Print the first worker's error once, record it, and return its exit code."""
    failure = first_failure(error, experiment.logs, workers_files)
    message = failure.message
    print_error(message)
    if not failure.told:
        _record_failure(experiment, stage, message)
    elif failure.exit_code == FlareError.exit_code and node_rank() == 0:
        # The run itself failed (other codes are refusals, of a run that another one may own), and rank 0 may have
        # recorded only that the rank which says why was gone.
        record_status(experiment, stage, "failed", error=message)
    return failure.exit_code


def _record_failure(experiment: Experiment, stage: int, message: str) -> None:
    """In the log, and on the first host as the stage's status: the other hosts' launchers only add a line."""
    if node_rank() > 0:
        message = f"host {socket.gethostname()}: {message}"
    _append_to_log(experiment, message)
    if node_rank() == 0:
        record_status(experiment, stage, "failed", error=message)


def _append_to_log(experiment: Experiment, message: str) -> None:
    if experiment.training_log.exists():
        with open(experiment.training_log, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {message}\n")
