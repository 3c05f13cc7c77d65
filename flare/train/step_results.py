"""What steps came to, on the way from the device to the host: loss, gradient norm, votes to stop.

On a GPU the host may not wait for a step before it has queued the next one. So the numbers travel by an
asynchronous copy and are read a step later (``lag`` 1), on all ranks at the same place; until then the device itself
keeps the optimizer from taking over what is not finite.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from flare.distributed import process_group
from flare.optim.loss_scale import LEAST_SCALE, LossScale


@dataclass(frozen=True)
class Place:
    """Where a step began, and the rows it took: what is said of it when it goes wrong."""

    step: int
    rows: int
    tokens: int
    row_indices: np.ndarray


class Outcome(NamedTuple):
    """Of one optimizer step, the same on every rank."""

    loss: float
    grad_norm: float
    stop: bool
    loss_scale: float | None = None
    """In fp16, that of the next step."""
    good_steps: float = 0

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def overflow(self) -> bool:
        """Whether only the gradients are not finite, in fp16: a smaller loss scale helps, if there is one."""
        scale = self.loss_scale
        return scale is not None and scale >= LEAST_SCALE and math.isfinite(self.loss) and not self.finite


class Outcomes:
    """Steps whose numbers the host has not read yet.

    Args:
        lag: steps that may be queued before the host reads the first one's numbers; 0: read each at once.
        loss_scale: of fp16; it is updated by each step that is put here.
    """

    def __init__(self, device: torch.device, lag: int, loss_scale: LossScale | None = None) -> None:
        self.lag = lag
        self.loss_scale = loss_scale
        self.pin = device.type == "cuda"
        self.failed = torch.zeros((), device=device)
        """1 from the first step on whose numbers end the run: the loss or the gradient norm is not finite."""
        self.found_inf = self.failed
        """The same, and 1 for a step whose fp16 gradients overflow; a fused optimizer leaves such updates out."""
        self._pending: deque[tuple[Place, torch.Tensor, torch.cuda.Event | None]] = deque()

    def put(self, place: Place, loss: torch.Tensor, grad_norm: torch.Tensor, stop: bool) -> None:
        """Add a step. ``loss`` is this rank's part, ``grad_norm`` the same everywhere, ``stop`` this rank's vote.

        A norm that is not finite on one rank alone (a broken GPU) is so for all: they must go on alike.
        """
        votes, norm = torch.full_like(loss, float(stop), dtype=torch.float64), grad_norm.double()
        parts = process_group.sum_in_place(torch.stack([loss.double(), votes, norm - norm]))  # 0, or NaN
        numbers = torch.stack([parts[0], torch.where(norm.isfinite(), norm + parts[2], norm), parts[1]])
        numbers = self._settle(numbers)
        event = None
        if self.pin:
            numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((place, numbers, event))

    def take(self, keep: int = 0) -> list[tuple[Place, Outcome]]:
        """(place, outcome) of all steps but the ``keep`` newest, oldest first; waits for them."""
        taken = []
        while len(self._pending) > keep:
            place, numbers, event = self._pending.popleft()
            if event:
                event.synchronize()
            loss, grad_norm, votes, *scale = numbers.tolist()
            taken.append((place, Outcome(loss, grad_norm, votes > 0, *scale)))
        return taken

    def _settle(self, numbers: torch.Tensor) -> torch.Tensor:
        """Decide on the device what becomes of a step's update; its numbers, with what the loss scale is now."""
        fails = 1 - torch.isfinite(numbers).all().float()
        scale, overflow = self.loss_scale, torch.zeros_like(fails)
        if scale:
            overflow = fails * numbers[0].isfinite()
            scale.update(fails)  # as GradScaler, which sees gradients only: those of a loss that is not finite are not
            overflow = overflow * (scale.scale >= LEAST_SCALE)
            numbers = torch.cat([numbers, torch.stack([scale.scale, scale.good_steps]).double()])
        self.failed = torch.maximum(self.failed, fails - overflow)
        self.found_inf = torch.maximum(self.failed, overflow)
        return numbers
