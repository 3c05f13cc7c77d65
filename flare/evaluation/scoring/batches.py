"""Windows through the model: batches of like length, shared out over the ranks, answers as float64."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from flare.data.training_rows import IGNORE_INDEX
from flare.distributed.process_group import World
from flare.errors import FlareError
from flare.evaluation.scoring.windows import Window

ALONE = World(0, 0, 1, torch.device("cpu"))
"""The world of a single process."""

Progress = Callable[[int, int], None]
"""Called with (tokens scored, tokens in all) of this process after every batch."""


@dataclass(frozen=True)
class Scored:
    """Answers of one batch: NLLs (n,) float64 and argmax hits (n,) bool, in the order of its windows' targets."""

    windows: list[Window]
    losses: np.ndarray
    hits: np.ndarray
    seconds: float

    def per_window(self) -> Iterator[tuple[Window, np.ndarray, np.ndarray]]:
        """(window, its NLLs, its hits)."""
        ends = np.cumsum([w.stop - w.first_target for w in self.windows])
        parts = zip(np.split(self.losses, ends[:-1]), np.split(self.hits, ends[:-1]), strict=True)
        for window, (losses, hits) in zip(self.windows, parts, strict=True):
            yield window, losses, hits


class Scorer(Protocol):
    """What answers for a model: ``scorer.TokenScorer``, or a model that is being trained."""

    model: nn.Module

    def score(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """NLL fp32 and argmax hits of the asked targets, (n,) each, on the CPU; both arguments (B, T)."""


@dataclass(frozen=True)
class Engine:
    """How windows are scored: by what, how many tokens at once, as which rank of how many.

    ``batch_tokens`` bounds rows x longest row of a batch; a window that is longer goes alone. ``equal_rounds``: every
    rank calls the model as often as the others, as a sharded one wants it.
    """

    scorer: Scorer
    batch_tokens: int
    world: World = ALONE
    equal_rounds: bool = False

    def score(
        self, windows: list[Window], sequences: list[list[int]], progress: Progress | None = None
    ) -> Iterator[Scored]:
        """This rank's share of the windows: together the ranks score each once.

        Raises: FlareError for a loss that is not finite, or no memory.
        """
        everyones = list(length_sorted_batches(windows, self.batch_tokens))
        batches = everyones[self.world.rank :: self.world.size]
        total = sum(w.stop - w.first_target for batch in batches for w in batch)
        done = 0
        for batch in batches:
            t0 = time.perf_counter()
            losses, hits = self.scorer.score(*pad_batch(batch, sequences))
            scored = Scored(batch, losses.double().numpy(), hits.numpy(), time.perf_counter() - t0)
            _check_finite(scored)
            yield scored
            done += len(losses)
            if progress is not None:
                progress(done, total)
        if self.equal_rounds and len(batches) * self.world.size < len(everyones):
            self.scorer.score(*pad_batch(everyones[-1], sequences))  # in step with the others; not counted


def length_sorted_batches(windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Batches of like lengths, longest first: little padding, and memory runs out at once or never."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda w: -w.input_length):
        if batch and (len(batch) + 1) * batch[0].input_length > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def pad_batch(batch: list[Window], sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and shifted labels, padded on the right: (B, T) int64 each. Padding asks for nothing."""
    longest = max(window.input_length for window in batch)
    input_ids = torch.zeros((len(batch), longest), dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORE_INDEX, dtype=torch.long)
    for row, window in enumerate(batch):
        sequence = sequences[window.document]
        input_ids[row, : window.input_length] = torch.tensor(window.inputs(sequence))
        labels[row, : window.input_length] = torch.tensor(window.labels(sequence, IGNORE_INDEX))
    return input_ids, labels


def _check_finite(scored: Scored) -> None:
    if np.isfinite(scored.losses).all():
        return
    for window, losses, _ in scored.per_window():
        if not np.isfinite(losses).all():
            value = losses[~np.isfinite(losses)][0]
            raise FlareError(
                f"the loss of document {window.document} is {value} in the window from token {window.start} to "
                f"{window.stop - 1}; the weights or the precision are not right (try --precision fp32)"
            )
