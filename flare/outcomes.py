"""What steps came to, on the way from the device to the host: loss, gradient norm, votes to stop.

On a card the host may not wait for a step before it has queued the next one. So the numbers travel by an
asynchronous copy and are read a step later (``lag`` 1), on all ranks at the same place; until then the device itself
keeps the optimizer from taking over what is not finite.
"""

from collections import deque
from typing import NamedTuple

import torch

from flare import distributed


class Outcome(NamedTuple):
    """Of one optimizer step, the same on every rank."""

    loss: float
    grad_norm: float
    stop: bool


class Outcomes:
    """Steps whose numbers the host has not read yet.

    Args:
        lag: steps that may be queued before the host reads the first one's numbers; 0: read each at once.
    """

    def __init__(self, device: torch.device, lag: int) -> None:
        self.lag = lag
        self.pin = device.type == "cuda"
        self.failed = torch.zeros((), device=device)
        """1 from the first step on whose loss or gradient norm is not finite; as ``found_inf`` of a fused
        optimizer it turns that update, and all later ones, off."""
        self._pending: deque[tuple[object, torch.Tensor, torch.cuda.Event | None]] = deque()

    def put(self, place: object, loss: torch.Tensor, grad_norm: torch.Tensor, stop: bool) -> None:
        """Add a step. ``loss`` is this rank's part, ``grad_norm`` the same everywhere, ``stop`` this rank's vote.

        A norm that is not finite on one rank alone (a broken card) is so for all: they must go on alike.
        """
        votes, norm = torch.full_like(loss, float(stop), dtype=torch.float64), grad_norm.double()
        parts = distributed.sum_in_place(torch.stack([loss.double(), votes, norm - norm]))  # 0, or NaN
        numbers = torch.stack([parts[0], torch.where(norm.isfinite(), norm + parts[2], norm), parts[1]])
        self.failed = torch.maximum(self.failed, 1 - torch.isfinite(numbers).all().float())
        event = None
        if self.pin:
            numbers = torch.empty(3, dtype=torch.float64, pin_memory=True).copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((place, numbers, event))

    def take(self, keep: int = 0) -> list[tuple[object, Outcome]]:
        """(place, outcome) of all steps but the ``keep`` newest, oldest first; waits for them."""
        taken = []
        while len(self._pending) > keep:
            place, numbers, event = self._pending.popleft()
            if event:
                event.synchronize()
            loss, grad_norm, votes = numbers.tolist()
            taken.append((place, Outcome(loss, grad_norm, votes > 0)))
        return taken
