"""Environment variables through which the launcher passes the device, the GPUs and resolved options to its workers.

Workers resolve the run again from the same command line. What depends on the time, free memory or nvidia-smi must be
decided only once, because ranks would differ otherwise.
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
    """Set the environment variables for workers, and return them."""
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
    """The options of a worker's command line, with the values that the launcher has resolved."""
    values = json.loads(os.environ.get(RESOLVED_VARIABLE, "{}"))
    return resolved.with_values(**values)


def worker_hardware(options: Options) -> Hardware:
    """The hardware of a torchrun worker: as the launcher has set it, otherwise GPUs if torch sees any.

    ``gpus`` are the GPUs of this node, in the order of local ranks.
    """
    world_size = int(os.environ["WORLD_SIZE"])
    device = os.environ.get(DEVICE_VARIABLE)
    if device == "cpu" or (device is None and options.gpu_type == "cpu"):
        return Hardware(False, world_size, nodes=num_nodes())
    planned = tuple(Gpu(**gpu) for gpu in json.loads(os.environ.get(GPUS_VARIABLE, "[]")))
    if planned:
        return Hardware(True, world_size, planned, num_nodes())
    gpus = gpus_of_torch()
    return Hardware(device == "cuda" or bool(gpus), world_size, gpus, num_nodes())


def gpus_of_torch() -> tuple[Gpu, ...]:
    """The GPUs that torch sees in this process; empty without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return ()
    gpus = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(
        Gpu(index, gpu.name, f"GPU-{gpu.uuid}", gpu.total_memory // 2**20, None) for index, gpu in enumerate(gpus)
    )
