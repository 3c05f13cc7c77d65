"""Start workers on this host through torchrun's API, and say truly how they ended.

A single process needs no launcher and runs in this one. For several, torchrun's agent starts the script
again, once a rank; it passes signals on, and its workers' first error is shown once, with its exit code.
"""

import json
import os
import shlex
import shutil
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

from flare.config import Resolved
from flare.errors import ConfigError, EnvError
from flare.experiment import Experiment
from flare.gpus import Gpu, GpuRequest, Selection, Skipped, query_gpus, select_environment, select_gpus
from flare.metrics_file import record_status
from flare.options import Options
from flare.plan import MIB, usable_bytes
from flare.setup import Hardware, Run

SHUTDOWN_TIMEOUT_SEC = 600
"""What torchrun's agent grants workers after a signal: a large model's last checkpoint takes minutes."""
DEVICE_VARIABLE = "FLARE_DEVICE"
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"


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


def num_nodes() -> int:
    """Hosts of the run: ``NNODES`` of the environment, else one."""
    return int(os.environ.get("NNODES", "1"))


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


def worker_hardware(options: Options) -> Hardware:
    """What a torchrun worker computes on: what our launcher said, else cards if torch sees any."""
    world_size = int(os.environ["WORLD_SIZE"])
    told = os.environ.get(DEVICE_VARIABLE)
    if told is not None:
        return visible_hardware(told == "cuda", world_size)
    import torch

    return visible_hardware(options.gpu_type != "cpu" and torch.cuda.is_available(), world_size)


def visible_hardware(use_cuda: bool, world_size: int) -> Hardware:
    """Cards as torch sees them in this process."""
    if not use_cuda:
        return Hardware(False, world_size, nodes=num_nodes())
    import torch

    cards = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    gpus = tuple(
        Gpu(index, card.name, f"GPU-{card.uuid}", card.total_memory // 2**20, None) for index, card in enumerate(cards)
    )
    return Hardware(True, world_size, gpus, num_nodes())


def export_environment(hardware: Hardware, selection: Selection | None) -> dict[str, str]:
    """Set and return the variables that workers find their device by."""
    variables = {DEVICE_VARIABLE: "cuda" if hardware.use_cuda else "cpu"}
    if selection:
        variables |= select_environment(selection)
    os.environ.update(variables)
    return variables


def shell_command(script: Path, resolved: Resolved, hardware: Hardware, selection: Selection | None) -> str:
    """The torchrun command that does what the launcher does, to read or to paste."""
    argv = [a for a in resolved.argv if a != "--dry_run"]
    variables = select_environment(selection) if selection else {DEVICE_VARIABLE: "cpu"}
    local = hardware.world_size // num_nodes()
    start = ["torchrun", "--standalone", f"--nproc_per_node={local}"]
    if num_nodes() > 1:
        start = [
            "torchrun", f"--nnodes={num_nodes()}", f"--node_rank={os.environ.get('NODE_RANK', '0')}",
            f"--master_addr={os.environ.get('MASTER_ADDR', '127.0.0.1')}",
            f"--master_port={os.environ.get('MASTER_PORT', '29500')}", f"--nproc_per_node={local}",
        ]  # fmt: skip
    prefix = "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items())
    return prefix + shlex.join([*start, str(script), *argv])


def start_workers(script: Path, argv: list[str], local_world_size: int, experiment: Experiment, stage: int) -> int:
    """Run the script once a rank through torchrun's agent; returns the exit code.

    0 also for a clean stop on a signal, which torchrun itself would call a failure.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local_world_size)))
    config = LaunchConfig(
        nproc_per_node=local_world_size,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        shutdown_timeout=SHUTDOWN_TIMEOUT_SEC,
        **_rendezvous(),
    )
    try:
        elastic_launch(config, sys.executable)("-u", str(script), *argv)
    except SignalException as error:
        status = experiment.read_metrics().get("stages", {}).get(str(stage), {}).get("status")
        if status in ("stopped", "finished"):
            return 0
        record_status(experiment, stage, "failed", error=f"ended by signal {error.sigval.name}")
        return 128 + error.sigval
    except ChildFailedError as error:
        return _report_failure(error, experiment, stage)
    return 0


def _rendezvous() -> dict:
    """One host: any free port. Several: the variables that schedulers and people set for torchrun."""
    if num_nodes() == 1:
        return {
            "min_nodes": 1, "max_nodes": 1, "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0",
        }  # fmt: skip
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise ConfigError(f"NNODES={num_nodes()} needs {' and '.join(missing)} in the environment, too")
    return {
        "min_nodes": num_nodes(),
        "max_nodes": num_nodes(),
        "run_id": "flare",
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '29500')}",
        "rdzv_configs": {"rank": int(os.environ["NODE_RANK"])},
    }


def _report_failure(error: object, experiment: Experiment, stage: int) -> int:
    """Print the first worker's error once, record it, and return its exit code."""
    rank, failure = error.get_first_failure()
    told = _told_error(failure.error_file)
    if told:
        message, code = told["message"], told["exit_code"]
    elif failure.exitcode < 0:
        message, code = f"rank {rank} was ended by {failure.signal_name()} (pid {failure.pid})", 5
    else:
        message, code = f"rank {rank} failed with exit code {failure.exitcode}; see {experiment.logs}", 5
    print(f"error: {message}", file=sys.stderr, flush=True)
    if not told:
        _append_to_log(experiment, message)
        record_status(experiment, stage, "failed", error=message)
    return code


def _append_to_log(experiment: Experiment, message: str) -> None:
    if experiment.training_log.exists():
        with open(experiment.training_log, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {message}\n")


def tell_launcher(message: str, exit_code: int) -> bool:
    """From a worker: leave the error for the launcher to show. False when no launcher of ours is there."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if not path or DEVICE_VARIABLE not in os.environ:
        return False
    content = {"message": {"message": message, "exit_code": exit_code, "extraInfo": {"timestamp": int(time.time())}}}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)
    except OSError:
        return False
    return True


def _told_error(path: str | None) -> dict | None:
    try:
        content = json.loads(Path(path or "").read_text(encoding="utf-8"))["message"]
        return content if "exit_code" in content else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
