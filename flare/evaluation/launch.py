"""Starts an evaluation on the selected GPUs (one process each), on the CPU, or on the device of --device."""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

from flare.errors import ConfigError, FlareError, print_error
from flare.evaluation.options import EvaluationSettings
from flare.gpus.selection import Selection, select_environment
from flare.gpus.specs import lacks_bf16
from flare.launch.agent import received_signal, run_agent
from flare.launch.hardware import check_torch_sees_cuda, choose_gpus, choose_hardware
from flare.launch.nodes import num_nodes
from flare.launch.worker_environment import DEVICE_VARIABLE, GPUS_VARIABLE, worker_hardware
from flare.launch.worker_errors import first_failure, report_to_launcher, stop_when_launcher_dies
from flare.run.run import Hardware


def start(script: Path, settings: EvaluationSettings, argv: list[str]) -> int:
    """Choose GPUs and processes, then evaluate here or in workers. Returns the exit code.

    Raises: ConfigError / EnvError of the choice.
    """
    if settings.device is not None and settings.device != "cpu":
        return evaluate_here(settings, settings.device)
    selection = None if settings.device == "cpu" else choose_gpus(settings)
    for line in selection.describe() if selection else ():
        print(line, file=sys.stderr)
    hardware = choose_hardware(settings, selection)
    _export_environment(hardware, selection)
    if hardware.use_cuda:
        check_torch_sees_cuda()
    if hardware.world_size == 1:
        return evaluate_here(settings, "cuda" if hardware.use_cuda else "cpu")
    return _start_workers(script, argv, hardware.world_size // num_nodes())


def _export_environment(hardware: Hardware, selection: Selection | None) -> None:
    """Set the environment variables that select the devices of the workers and of this process."""
    os.environ[DEVICE_VARIABLE] = "cuda" if hardware.use_cuda else "cpu"
    os.environ[GPUS_VARIABLE] = json.dumps([asdict(gpu) for gpu in hardware.gpus])
    if selection:
        os.environ.update(select_environment(selection))


def _start_workers(script: Path, argv: list[str], local_world_size: int) -> int:
    """Run the script once per rank. Returns 3 if a data set failed, as a single process does."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run_agent(script, argv, local_world_size)
    except SignalException as error:
        return 128 + received_signal(error)
    except ChildFailedError as error:
        failure = first_failure(error, "the lines above")
        print_error(failure.message)
        return failure.exit_code
    return 0


def evaluate_here(settings: EvaluationSettings, device: str) -> int:
    """Evaluate in this process alone.

    Raises: ConfigError for a device that torch does not see.
    """
    import torch

    from flare.distributed.process_group import AMPERE
    from flare.evaluation.scoring.batches import ALONE
    from flare.evaluation.session import Evaluation
    from flare.logs import start_logging

    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: torch {torch.__version__} sees no GPU; give --device cpu")
    start_logging()
    place = None if device == "auto" else torch.device(device)
    gpus = range(torch.cuda.device_count() if on_gpu else 0)
    old = any(torch.cuda.get_device_capability(gpu) < AMPERE for gpu in gpus)
    return Evaluation(with_precision(settings, on_gpu, old), ALONE, place).run()


def join(settings: EvaluationSettings) -> int:
    """Be one of torchrun's workers. Returns 0, or 3 after a failed data set; errors go to the launcher."""
    from flare.distributed import process_group
    from flare.evaluation.session import Evaluation
    from flare.logs import start_logging

    start_logging(process_group.rank_from_environment(), int(os.environ["WORLD_SIZE"]))
    stop_when_launcher_dies()
    try:
        hardware = worker_hardware(settings)
        world = process_group.start(hardware.use_cuda, settings.ddp_timeout, hardware.gpus)
        old = any(lacks_bf16(gpu.name) for gpu in hardware.gpus)
        code = Evaluation(with_precision(settings, hardware.use_cuda, old), world, world.device).run()
        process_group.stop()
        if code:
            report_to_launcher("not everything could be evaluated; see the report", code)
    except FlareError as error:
        if report_to_launcher(str(error), error.exit_code):
            return error.exit_code
        raise
    return code


def with_precision(settings: EvaluationSettings, on_gpu: bool, old: bool) -> EvaluationSettings:
    """Resolve ``--precision auto``. ``old``: at least one GPU is older than Ampere and has no bf16."""
    if settings.precision != "auto":
        return settings
    on_gpus = "fp16" if old else "bf16"
    return replace(settings, precision=on_gpus if on_gpu else "fp32")
