"""Start the workers of this node through torchrun's API, and report how they ended.

A run of a single process needs no launcher. For several processes, torchrun's agent starts the script again, once per
rank, and forwards signals. The first error of a worker is printed once, and its exit code is returned.
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
"""How long the launchers of other nodes wait until rank 0 has recorded how the run ended."""


def shell_command(script: Path, run: Run, selection: Selection | None) -> str:
    """The torchrun command that is equivalent to what the launcher does."""
    argv = _without_dry_run(run.resolved.argv)
    if run.resolved.name_is_default:  # otherwise each worker would make its own name from the time
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
    """The command line without ``--dry_run``, written alone, with a value or with ``=``."""
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
    """Reserve a default experiment name: of two launches in the same second, the later one gets ``_2``.

    The directory is created here, and removed at the end if it is still empty.
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
    """Train in one process per rank through torchrun's agent. Returns the exit code.

    The code is also 0 after a clean stop on a signal, which torchrun itself reports as a failure.

    Raises: EnvError when this node cannot connect to the others.
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
        kill_workers()  # some may be left if another signal ended the wait for them
        _record_failure(experiment, stage, f"ended by signal {received_signal(error).name}")
        return 128 + received_signal(error)
    except ChildFailedError as error:
        return _report_failure(error, Path(logs.root_log_dir), experiment, stage)
    return 0


def _ended_cleanly(experiment: Experiment, stage: int) -> bool:
    """Whether a clean end was recorded. Rank 0 records it, so the launchers of other nodes may have to wait."""
    deadline = time.monotonic() + (0 if node_rank() == 0 else RECORD_WAIT_SEC)
    while True:
        status = experiment.read_metrics().get("stages", {}).get(str(stage), {}).get("status")
        if status in ("stopped", "finished") or time.monotonic() > deadline:
            return status in ("stopped", "finished")
        time.sleep(0.2)


def _report_failure(error: object, error_files: Path, experiment: Experiment, stage: int) -> int:
    """Print the first worker's error once, record it, and return its exit code."""
    failure = first_failure(error, experiment.logs, error_files)
    message = failure.message
    print_error(message)
    if not failure.is_reported:
        _record_failure(experiment, stage, message)
    elif failure.exit_code == FlareError.exit_code and node_rank() == 0:
        # The run itself failed. (With other exit codes the run was refused, and may belong to another process.) Rank 0
        # may have recorded only that another rank is gone, so this message replaces it.
        record_status(experiment, stage, "failed", error=message)
    return failure.exit_code


def _record_failure(experiment: Experiment, stage: int, message: str) -> None:
    """Write the message to training.log. On the first node, also record that the stage failed."""
    if node_rank() > 0:
        message = f"node {socket.gethostname()}: {message}"
    _append_to_log(experiment, message)
    if node_rank() == 0:
        record_status(experiment, stage, "failed", error=message)


def _append_to_log(experiment: Experiment, message: str) -> None:
    if experiment.training_log.exists():
        with open(experiment.training_log, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {message}\n")
