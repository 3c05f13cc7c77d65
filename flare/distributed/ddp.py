"""Data-parallel training: wrap the model in DDP, reduce and clip gradients."""

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
    """Wrap the module in DDP. Returns the module itself at world size 1 and when it is sharded.

    DDP and FSDP2 divide the summed gradients by the number of ranks. The trainer multiplies its loss by that number,
    so gradients are sums over the global batch on every layout.
    """
    if world.size == 1 or is_sharded(module):
        return module
    device_ids = [world.local_rank] if world.device.type == "cuda" else None
    # The buffers (cos and sin) follow from the configuration, so no forward pass has to broadcast them.
    with warnings.catch_warnings():
        # torch 2.13 renamed the argument; torch 2.11 does not know the new name.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            module, device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False
        )


@contextlib.contextmanager
def reduce_gradients(module: torch.nn.Module, now: bool) -> Iterator[None]:
    """Run a backward pass with or without the gradient reduction. Only the last micro-batch needs the reduction.

    A sharded model reduces after every micro-batch: without it, each rank would hold full-size gradients until the
    last one.
    """
    if now or not isinstance(module, DistributedDataParallel):
        yield
    else:
        with module.no_sync():
            yield


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip the gradients by their total norm over all parameters and shards. Returns the norm before clipping, ()."""
    return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
