"""Dynamic loss scaling for fp16, whose smallest numbers gradients would fall below.

The loss is multiplied by a scale before the backward pass, the gradients are divided by it after their reduction. A
step whose gradients overflow is left out and halves the scale; after ``GROWTH_INTERVAL`` good steps it doubles. As
torch.amp.GradScaler does it, whose constants and kernel these are; that class itself reads a flag on the host in each
step where an optimizer is not fused, and decides for each rank by itself, which shards must not.
Source: Micikevicius et al., Mixed Precision Training (2018).
"""

from collections.abc import Iterable

import torch

from flare.distributed.fsdp import local_tensor

INITIAL_SCALE, GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""torch.amp.GradScaler's defaults."""
MIN_SCALE = 1.0
"""Gradients that overflow when they are not enlarged are not the scale's fault."""

RANGE_HINT = "; fp16 ends at 65,504: --precision fp32, or bf16 where GPUs have it, goes further"
"""What ends the message about numbers that no scale makes finite."""


class LossScale:
    """The scale and its count of good steps, on the device: nothing here waits for it.

    Args:
        scale: to go on from; None: a fresh start.
        good_steps: since the scale last changed.
    """

    def __init__(self, device: torch.device, scale: float | None = None, good_steps: int = 0) -> None:
        self.scale = torch.full((), INITIAL_SCALE if scale is None else scale, device=device)
        self.good_steps = torch.full((), good_steps, dtype=torch.int32, device=device)

    def unscale(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divide the (fp32) gradients by the scale, which is a power of two: no digit is lost."""
        gradients = [local_tensor(p.grad) for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, self.scale.reciprocal())

    def update(self, overflow: torch.Tensor) -> None:
        """Settle the next step's scale. ``overflow`` () fp32, the same on all ranks: 1 if this step's gradients do."""
        torch._amp_update_scale_(self.scale, self.good_steps, overflow, GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL)
