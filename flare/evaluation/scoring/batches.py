"""Scores windows in batches of similar length, distributed over the ranks. Results are float64."""

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
"""World of a single process."""

Progress = Callable[[int, int], None]
"""Called after every batch with (tokens scored, total tokens) of this process."""


@dataclass(frozen=True)
class Scored:
    """Scores of one batch: NLL (n,) float64 and argmax hits (n,) bool, in the order of the targets of its windows."""

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
    """Interface of ``scorer.TokenScorer`` and of a model that is being trained."""

    model: nn.Module

    def score(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """NLL (fp32) and argmax hits of the n scored targets, (n,) each, on the CPU. Both arguments are (B, T)."""


@dataclass(frozen=True)
class Engine:
    """Scores windows with a scorer, in batches, on all ranks.

    ``batch_tokens`` limits rows x longest row of a batch; a longer window is a batch by itself. ``equal_rounds``:
    every rank calls the model equally often, which a sharded model requires.
    """

    scorer: Scorer
    batch_tokens: int
    world: World = ALONE
    equal_rounds: bool = False

    def score(
        self, windows: list[Window], sequences: list[list[int]], progress: Progress | None = None
    ) -> Iterator[Scored]:
        """Score this rank's share of the windows. All ranks together score each window once.

        Raises: FlareError for a non-finite loss, or if memory runs out.
        """
        all_batches = list(length_sorted_batches(windows, self.batch_tokens))
        batches = all_batches[self.world.rank :: self.world.size]
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
        if self.equal_rounds and len(batches) * self.world.size < len(all_batches):
            self.scorer.score(*pad_batch(all_batches[-1], sequences))  # keeps collectives in step; result not used


def length_sorted_batches(windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Batches of similar length, longest first: little padding, and out-of-memory errors occur at the start."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda w: -w.input_length):
        if batch and (len(batch) + 1) * batch[0].input_length > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def pad_batch(batch: list[Window], sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and shifted labels, padded on the right: (B, T) int64 each. Padding is not scored."""
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
                f"{window.stop - 1}; the weights are damaged or the precision is too low (try --precision fp32)"
            )
