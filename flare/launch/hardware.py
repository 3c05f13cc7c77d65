"""Choose the GPUs and the number of processes of a run, before torch is imported."""

import os
import shutil
from dataclasses import replace

from flare.config.options import Options
from flare.errors import ConfigError, EnvError
from flare.gpus.nvidia_smi import query_gpus
from flare.gpus.selection import GpuRequest, Selection, Skipped, select_gpus
from flare.launch.nodes import num_nodes
from flare.plan.capacity import MIB, usable_bytes
from flare.run.run import Hardware, Run


def choose_gpus(options: Options) -> Selection | None:
    """Choose GPUs by the options. Returns None for a CPU run.

    Raises: ConfigError / EnvError of ``flare.gpus``.
    """
    if options.gpu_type == "cpu":
        return None
    is_requested = options.gpu_ids is not None or options.gpu_type is not None
    if not is_requested and shutil.which("nvidia-smi") is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpu_type = None if options.gpu_ids is not None else options.gpu_type or "auto"
    request = GpuRequest(gpu_type, options.gpu_ids, options.allow_busy_gpus)
    return select_gpus(request, query_gpus(visible=visible), visible)


def exclude_small_gpus(run: Run, selection: Selection) -> Selection:
    """Skip GPUs that are too small for the run, if the user named no GPUs and at least one GPU is large enough."""
    if run.options.gpu_ids is not None or run.options.gpu_type is not None:
        return selection
    need = run.plan().memory.peak_bytes
    small = [g for g in selection.gpus if g.memory_total_mib and usable_bytes(g.memory_total_mib * MIB) < need]
    if not small or len(small) == len(selection.gpus):
        return selection
    skipped = [Skipped(g, f"too small: {need / 2**30:.1f} GiB needed; use it anyway with --gpu_ids") for g in small]
    rest = [gpu for gpu in selection.gpus if gpu not in small]
    return replace(selection, gpus=rest, skipped=[*selection.skipped, *skipped])


def choose_hardware(options: Options, selection: Selection | None) -> Hardware:
    """The GPUs of this node and the number of processes of the run.

    Raises: ConfigError for more processes than GPUs.
    """
    count = len(selection.gpus) if selection else 0
    local = options.nproc_per_node or count or 1
    if selection and local > count:
        raise ConfigError(f"--nproc_per_node {local}: {local} processes but {count} GPUs; lower --nproc_per_node")
    gpus = tuple(selection.gpus[:local]) if selection else ()
    return Hardware(bool(gpus), local * num_nodes(), gpus, num_nodes())


def check_torch_sees_cuda() -> None:
    """Check that torch can use the GPUs. There is no silent fallback to the CPU.

    Raises: EnvError when torch cannot use the driver.
    """
    import torch

    if not torch.cuda.is_available():
        raise EnvError(
            f"nvidia-smi lists GPUs, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use them; "
            "install a torch build for your driver (see README, Environment), or --gpu_type cpu"
        )
