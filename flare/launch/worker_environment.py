"""What the launcher settled and hands to its workers in the environment: device, GPUs, options.

Workers settle the run again from the same command line; what the clock, free memory or nvidia-smi decided
must not be decided a second time, or ranks would differ.
"""

import json
import os
from dataclasses import asdict

from flare.config.options import Options
from flare.config.parse import ResolvedOptions
from flare.gpus.nvidia_smi import Gpu
from flare.gpus.selection import Selection, select_environment
from flare.launch.nodes import gloo_environment, num_nodes
from flare.run.run import Hardware, Run

DEVICE_VARIABLE = "FLARE_DEVICE"
GPUS_VARIABLE = "FLARE_PLANNED_GPUS"
RESOLVED_VARIABLE = "FLARE_RESOLVED_OPTIONS"
RESOLVED_OPTIONS = ("per_device_train_batch_size", "global_batch_size", "gradient_checkpointing", "parallel")


def export_environment(run: Run, selection: Selection | None) -> dict[str, str]:
    """Set and return the variables that workers find their device, their GPUs and settled options by."""
    variables = {
        DEVICE_VARIABLE: "cuda" if run.hardware.use_cuda else "cpu",
        GPUS_VARIABLE: json.dumps([asdict(gpu) for gpu in run.hardware.gpus]),
        RESOLVED_VARIABLE: json.dumps({name: getattr(run.options, name) for name in RESOLVED_OPTIONS}),
    }
    variables |= gloo_environment()
    if selection:
        variables |= select_environment(selection)
    os.environ.update(variables)
    return variables


def options_from_launcher(resolved: ResolvedOptions) -> ResolvedOptions:
    """The options of a worker: those of its command line, with what the launcher settled."""
    told = json.loads(os.environ.get(RESOLVED_VARIABLE, "{}"))
    return resolved.with_values(**told)


def worker_hardware(options: Options) -> Hardware:
    """What a torchrun worker computes on: what our launcher said, else GPUs if torch sees any.

    ``gpus`` are this host's GPUs, in the order of local ranks.
    """
    world_size = int(os.environ["WORLD_SIZE"])
    told = os.environ.get(DEVICE_VARIABLE)
    if told == "cpu" or (told is None and options.gpu_type == "cpu"):
        return Hardware(False, world_size, nodes=num_nodes())
    planned = tuple(Gpu(**gpu) for gpu in json.loads(os.environ.get(GPUS_VARIABLE, "[]")))
    if planned:
        return Hardware(True, world_size, planned, num_nodes())
    gpus = visible_gpus()
    return Hardware(told == "cuda" or bool(gpus), world_size, gpus, num_nodes())


def visible_gpus() -> tuple[Gpu, ...]:
    """GPUs as torch sees them in this process; none without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return ()
    gpus = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(
        Gpu(index, gpu.name, f"GPU-{gpu.uuid}", gpu.total_memory // 2**20, None) for index, gpu in enumerate(gpus)
    )
