"""Start workers on this host through torchrun's API, and say truly how they ended.

A single process needs no launcher and runs in this one. For several, torchrun's agent starts the script
again, once a rank; it passes signals on, and its workers' first error is shown once, with its exit code.
"""

import contextlib
import itertools
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flare.config import Resolved
from flare.errors import ConfigError, EnvError, FlareError, first_line, print_error
from flare.experiment import Experiment
from flare.gpus import GpuRequest, Selection, Skipped, select_environment, select_gpus
from flare.handoff import DEVICE_VARIABLE
from flare.hosts import master, node_rank, num_nodes, rendezvous
from flare.metrics_file import record_status
from flare.nvidia_smi import query_gpus
from flare.options import Options
from flare.rooms import MIB, usable_bytes
from flare.run import Hardware, Run
from flare.terminal import tell_of_stop
from flare.worker_errors import first_failure

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException

INTERRUPTED = "interrupted"

SHUTDOWN_TIMEOUT_SEC = 600
"""What torchrun's agent grants workers after a signal: a large model's last checkpoint takes minutes."""
RECORD_WAIT_SEC = 10.0
"""How long another host's launcher waits for the first one's rank 0 to record how the run ended."""


def choose_gpus(options: Options) -> Selection | None:
    """The cards that the options ask for, or None for a CPU run.

    Raises: ConfigError / EnvError of ``flare.gpus``.
    """
    if options.gpu_type == "cpu":
        return None
    asked = options.gpu_ids is not None or options.gpu_type is not None
    if not asked and shutil.which("nvidia-smi") is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpu_type = None if options.gpu_ids is not None else options.gpu_type or "auto"
    request = GpuRequest(gpu_type, options.gpu_ids, options.allow_busy_gpus)
    return select_gpus(request, query_gpus(visible=visible), visible)


def leave_out_small_cards(run: Run, selection: Selection) -> Selection:
    """When the user named no cards: those that can hold the run, if some can and some cannot."""
    if run.options.gpu_ids is not None or run.options.gpu_type is not None:
        return selection
    need = run.plan().memory.peak_bytes
    small = [g for g in selection.gpus if g.memory_total_mib and usable_bytes(g.memory_total_mib * MIB) < need]
    if not small or len(small) == len(selection.gpus):
        return selection
    skipped = [Skipped(g, f"too small: {need / 2**30:.1f} GiB needed; --gpu_ids takes it all the same") for g in small]
    rest = [gpu for gpu in selection.gpus if gpu not in small]
    return replace(selection, gpus=rest, skipped=[*selection.skipped, *skipped])


def hardware_of(options: Options, selection: Selection | None) -> Hardware:
    """Cards and number of processes of this run.

    Raises: ConfigError for more processes than cards.
    """
    cards = len(selection.gpus) if selection else 0
    local = options.nproc_per_node or cards or 1
    if selection and local > cards:
        raise ConfigError(f"--nproc_per_node {local}: {local} processes but {cards} cards; lower --nproc_per_node")
    gpus = tuple(selection.gpus[:local]) if selection else ()
    return Hardware(bool(gpus), local * num_nodes(), gpus, num_nodes())


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
def claimed_name(resolved: Resolved) -> Iterator[Resolved]:
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
        yield resolved.with_name(root.name)
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
        _kill_workers()  # that are left when another signal came while they were waited for: the third one
        _record_failure(experiment, stage, f"ended by signal {received(error).name}")
        return 128 + received(error)
    except ChildFailedError as error:
        return _report_failure(error, Path(logs.root_log_dir), experiment, stage)
    return 0


def run_agent(script: Path, argv: list[str], local_world_size: int, logs: "DefaultLogsSpecs | None" = None) -> None:
    """Run a script once a rank through torchrun's agent, to its end.

    Args:
        logs: where workers leave their errors; a new place by default.
    Raises: SignalException, ChildFailedError of torchrun; EnvError when this host does not meet the others.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local_world_size)))
    config = LaunchConfig(
        nproc_per_node=local_world_size,
        max_restarts=0,
        logs_specs=logs or DefaultLogsSpecs(),
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT,SIGUSR1",
        **_grant_shutdown(LaunchConfig),
        **rendezvous(),
    )
    signal.signal(signal.SIGINT, _on_interrupt)
    # What a worker's end means we say ourselves.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-u", str(script), *argv)
    except DistError as error:
        address, port = master()
        raise EnvError(
            f"the {num_nodes()} hosts of this run do not meet at {address}:{port}: {first_line(error)}; "
            "see NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT (another one if it is in use)"
        ) from error


def _grant_shutdown(config_class: type) -> dict[str, int]:
    """What grants workers ``SHUTDOWN_TIMEOUT_SEC``; torch 2.11 has none: there it is a method's default."""
    if "shutdown_timeout" in config_class.__dataclass_fields__:
        return {"shutdown_timeout": SHUTDOWN_TIMEOUT_SEC}
    from torch.distributed.elastic.multiprocessing.api import PContext

    PContext.close.__defaults__ = (None, SHUTDOWN_TIMEOUT_SEC)  # (death_sig, timeout)
    return {}


def _on_interrupt(_number: int, _frame: object) -> None:
    """First Ctrl-C: workers finish their step and write a checkpoint. Second: all end at once."""
    from torch.distributed.elastic.multiprocessing import SignalException

    signal.signal(signal.SIGINT, _on_second_interrupt)
    tell_of_stop()
    raise SignalException(INTERRUPTED, sigval=signal.SIGTERM)


def received(error: "SignalException") -> signal.Signals:
    """The signal that this process got. Ctrl-C goes on to workers as SIGTERM: one that is still starting then ends
    without a traceback."""
    return signal.SIGINT if error.args == (INTERRUPTED,) else error.sigval


def _on_second_interrupt(_number: int, _frame: object) -> None:
    _kill_workers()
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def _kill_workers() -> None:
    """Workers have sessions of their own, so the terminal's Ctrl-C does not reach them: end them from here."""
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            os.killpg(int(pid), signal.SIGKILL)


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


def check_torch_sees_cuda() -> None:
    """A torch that cannot use the driver is one clear line, never a silent fall to the CPU.

    Raises: EnvError.
    """
    import torch

    if not torch.cuda.is_available():
        raise EnvError(
            f"nvidia-smi lists cards, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use them; "
            "install a torch build for your driver (see README, Environment), or --gpu_type cpu"
        )
