"""Confidence interval of the difference between two models: paired bootstrap over documents."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
BLOCK_WEIGHTS = 1_000_000
"""Weights (resamples x documents) in memory at a time: 8 MB."""


@dataclass(frozen=True)
class Difference:
    """A difference of two ratios of sums with its 95 % interval (None for a single document)."""

    value: float
    interval: tuple[float, float] | None


def paired_difference(
    nll: np.ndarray, sizes: np.ndarray, other_nll: np.ndarray, other_sizes: np.ndarray, seed: int = 0
) -> Difference:
    """``sum(nll)/sum(sizes) - sum(other_nll)/sum(other_sizes)`` with a 95 % bootstrap interval over documents.

    Each resample draws all documents with replacement, the same ones for both models (paired), so that the difficulty
    of a document does not widen the interval. Percentile interval with ``RESAMPLES`` resamples.

    Args:
        nll, other_nll: (documents,) float64, NLL summed over each document.
        sizes, other_sizes: (documents,) tokens; for bits per byte: bytes times ln 2.
    Source: Efron and Tibshirani 1993, chapter 13.
    """
    columns = np.stack([nll, sizes, other_nll, other_sizes]).astype(np.float64)
    value = float(_difference(columns.sum(1)[None])[0])
    count = columns.shape[1]
    if count < 2:
        return Difference(value, None)
    draw = np.random.default_rng(seed)
    block = max(1, BLOCK_WEIGHTS // count)
    values = []
    for first in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - first)
        weights = draw.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)
        values.append(_difference(weights @ columns.T))
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return Difference(value, (float(low), float(high)))


def _difference(sums: np.ndarray) -> np.ndarray:
    """(n, 4) sums -> (n,) differences of ratios."""
    return sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
