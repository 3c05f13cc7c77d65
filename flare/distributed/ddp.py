"""Data-parallel training: wrapping the model, reducing and clipping gradients."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch.nn.parallel import DistributedDataParallel

from flare.distributed.fsdp import full_tensor, is_sharded
from flare.distributed.process_group import (
    World,
)


def wrap_ddp(module: torch.nn.Module, world: World) -> torch.nn.Module:
    """Data parallel training over all ranks; the module itself at world size 1, and when it is sharded.

    DDP, as FSDP2, divides summed gradients by the number of ranks; the trainer multiplies its loss by it, so that
    gradients are sums over the global batch whatever the layout.
    """
    if world.size == 1 or is_sharded(module):
        return module
    device_ids = [world.local_rank] if world.device.type == "cuda" else None
    # Buffers (cos and sin) follow from the configuration: there is nothing to broadcast in each forward pass.
    with warnings.catch_warnings():
        # torch 2.13 has another name for it, which 2.11 does not know.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            module, device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False
        )


@contextlib.contextmanager
def reduce_gradients(module: torch.nn.Module, now: bool) -> Iterator[None]:
    """Run a backward pass with or without the gradient reduction (only the last micro-batch needs it).

    A sharded model reduces each time: what it would sum up until the last are whole gradients.
    """
    if now or not isinstance(module, DistributedDataParallel):
        yield
    else:
        with module.no_sync():
            yield


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip the gradients to this norm over all parameters and shards. Returns the norm before, shape ()."""
    return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
