"""Dynamic loss scaling for fp16, in which small gradients would underflow to zero.

The loss is multiplied by a scale before the backward pass, and the gradients are divided by it after their reduction.
A step whose gradients overflow is skipped and halves the scale. After ``GROWTH_INTERVAL`` good steps it doubles.
Constants and kernel are those of torch.amp.GradScaler. That class itself is not used for two reasons: it synchronizes
with the host in each step when the optimizer is not fused, and each rank decides alone, which is wrong with shards.
Source: Micikevicius et al., Mixed Precision Training (2018).
"""

from collections.abc import Iterable

import torch

from flare.distributed.fsdp import local_tensor

INITIAL_SCALE, GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""Defaults of torch.amp.GradScaler."""
MIN_SCALE = 1.0
"""Below this the scale would shrink gradients. If they overflow at 1, the scale is not the cause."""

RANGE_HINT = "; fp16 ends at 65,504: use --precision fp32, or bf16 on GPUs that have it"
"""End of the error about numbers that no scale makes finite."""


class LossScale:
    """The loss scale and the number of good steps, as tensors on the device. No method synchronizes with the host.

    Args:
        scale: the scale to continue with; None for the initial one.
        good_steps: number of steps without overflow since the scale last changed.
    """

    def __init__(self, device: torch.device, scale: float | None = None, good_steps: int = 0) -> None:
        self.scale = torch.full((), INITIAL_SCALE if scale is None else scale, device=device)
        self.good_steps = torch.full((), good_steps, dtype=torch.int32, device=device)

    def unscale(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divide the (fp32) gradients by the scale. The scale is a power of two, so this is exact."""
        gradients = [local_tensor(p.grad) for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, self.scale.reciprocal())

    def update(self, overflow: torch.Tensor) -> None:
        """Set the scale of the next step. ``overflow`` () fp32, equal on all ranks: 1 if this step has overflowed."""
        torch._amp_update_scale_(self.scale, self.good_steps, overflow, GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL)
