"""Results of training steps on their way from the device to the host: loss, gradient norm, votes to stop.

On a GPU the host must not wait for a step before it has queued the next one. So the numbers are copied
asynchronously and read one step later (``lag`` 1), on all ranks at the same place in the code. Until then a flag on
the device keeps the optimizer from applying an update that is not finite.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from flare.distributed import process_group
from flare.optim.loss_scale import MIN_SCALE, LossScale


@dataclass(frozen=True)
class StepStart:
    """The train state before a step, and the indices of the step's rows: used in the error when the step fails."""

    step: int
    rows: int
    tokens: int
    row_indices: np.ndarray


class StepResult(NamedTuple):
    """The result of one optimizer step, the same on every rank."""

    loss: float
    grad_norm: float
    stop: bool
    loss_scale: float | None = None
    """The loss scale of the next step, in fp16."""
    good_steps: float = 0

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def overflow(self) -> bool:
        """Whether, in fp16, only the gradients are not finite and the loss scale can still be lowered."""
        scale = self.loss_scale
        return scale is not None and scale >= MIN_SCALE and math.isfinite(self.loss) and not self.finite


class PendingResults:
    """Results of steps that the host has not read yet.

    Args:
        lag: how many steps may be queued before the host reads the first one's numbers; 0: read each at once.
        loss_scale: of fp16; each ``put`` updates it.
    """

    def __init__(self, device: torch.device, lag: int, loss_scale: LossScale | None = None) -> None:
        self.lag = lag
        self.loss_scale = loss_scale
        self.pin = device.type == "cuda"
        self.failed = torch.zeros((), device=device)
        """1 from the first step whose loss or gradient norm is not finite and ends the run."""
        self.found_inf = self.failed
        """Also 1 for a step whose fp16 gradients overflow. A fused optimizer skips the update when this is 1."""
        self._pending: deque[tuple[StepStart, torch.Tensor, torch.cuda.Event | None]] = deque()

    def put(self, start: StepStart, loss: torch.Tensor, grad_norm: torch.Tensor, stop: bool) -> None:
        """Add a step. A collective.

        A norm that is not finite on one rank only (a broken GPU) becomes not finite on all, so that all ranks take
        the same path.

        Args:
            loss: this rank's share of the step's loss; the shares are summed.
            grad_norm: the same on every rank.
            stop: this rank's vote to stop.
        """
        votes, norm = torch.full_like(loss, float(stop), dtype=torch.float64), grad_norm.double()
        sums = process_group.all_reduce_sum(torch.stack([loss.double(), votes, norm - norm]))  # norm - norm: 0, or NaN
        numbers = torch.stack([sums[0], torch.where(norm.isfinite(), norm + sums[2], norm), sums[1]])
        numbers = self._update_flags(numbers)
        event = None
        if self.pin:
            numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((start, numbers, event))

    def take(self, keep: int = 0) -> list[tuple[StepStart, StepResult]]:
        """All steps except the ``keep`` newest, oldest first. Waits for their numbers."""
        taken = []
        while len(self._pending) > keep:
            start, numbers, event = self._pending.popleft()
            if event:
                event.synchronize()
            loss, grad_norm, votes, *scale = numbers.tolist()
            taken.append((start, StepResult(loss, grad_norm, votes > 0, *scale)))
        return taken

    def _update_flags(self, numbers: torch.Tensor) -> torch.Tensor:
        """Set ``failed`` and ``found_inf`` on the device. Returns the numbers, in fp16 with the new loss scale."""
        fails = 1 - torch.isfinite(numbers).all().float()
        scale, overflow = self.loss_scale, torch.zeros_like(fails)
        if scale:
            overflow = fails * numbers[0].isfinite()
            scale.update(fails)  # as GradScaler, which sees only gradients: a loss that is not finite makes them so
            overflow = overflow * (scale.scale >= MIN_SCALE)
            numbers = torch.cat([numbers, torch.stack([scale.scale, scale.good_steps]).double()])
        self.failed = torch.maximum(self.failed, fails - overflow)
        self.found_inf = torch.maximum(self.failed, overflow)
        return numbers
