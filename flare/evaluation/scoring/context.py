"""Perplexity by context length: the same last tokens of long documents, with increasing context.

Lengths beyond the training length show whether a model with NoPE layers extrapolates.
"""

import math

from torch import nn

from flare.distributed import process_group
from flare.errors import DataError
from flare.evaluation.scoring.batches import Engine, Progress
from flare.evaluation.scoring.perplexity import finite_exp
from flare.evaluation.scoring.scorer import check_length, check_vocabulary
from flare.evaluation.scoring.token_sequences import resolve_prefix, tokenize_documents
from flare.evaluation.scoring.windows import tail_window

MAX_TARGETS = 256
"""Scored tokens per document, at most half of the shortest context length, so that every scored token sees at least
half of the context length of its row."""


def num_targets(context_lengths: list[int]) -> int:
    """Scored tokens per document: the same ones at every length."""
    return min(MAX_TARGETS, max(1, min(context_lengths) // 2))


def score_context_lengths(
    engine: Engine,
    tokenizer,
    texts: list[str],
    context_lengths: list[int],
    progress: Progress | None = None,
    prefix_token_id: int | None = None,
) -> list[dict]:
    """Score the last ``num_targets`` tokens of each document with every context length. A collective.

    Only documents with at least as many tokens as the longest context are used, so that all rows score the same
    tokens.

    Returns: rows ``{"context_length", "loss", "perplexity", "num_tokens", "num_documents"}``, shortest first.
    Raises: DataError if no document is long enough.
    """
    sequences = tokenize_documents(tokenizer, texts, resolve_prefix(tokenizer, prefix_token_id))
    return score_tails(engine, sequences, context_lengths, progress)


def score_tails(
    engine: Engine, sequences: list[list[int]], context_lengths: list[int], progress: Progress | None = None
) -> list[dict]:
    """Same as ``score_context_lengths``, for documents ``[prefix, tokens...]``."""
    lengths = sorted(set(context_lengths))
    long = [i for i, sequence in enumerate(sequences) if len(sequence) - 1 >= lengths[-1]]
    if not long:
        longest = max((len(sequence) - 1 for sequence in sequences), default=0)
        raise DataError(f"no document holds {lengths[-1]:,} tokens (the longest has {longest:,})")
    model = engine.scorer.model
    check_vocabulary(model, max(max(sequences[i]) for i in long))
    check_length(model, lengths[-1])
    targets = num_targets(lengths)
    windows = [tail_window(i, len(sequences[i]) - 1, length, targets) for i in long for length in lengths]

    def my_share() -> dict[int, tuple[float, int]]:
        sums = dict.fromkeys(lengths, (0.0, 0))
        for scored in engine.score(windows, sequences, progress):
            for window, losses, _ in scored.per_window():
                nll, count = sums[window.input_length]
                sums[window.input_length] = (nll + float(losses.sum()), count + len(losses))
        return sums

    parts = process_group.run_on_all_ranks(engine.world, my_share)
    return [_row(length, [part[length] for part in parts], len(long)) for length in lengths]


def _row(length: int, sums: list[tuple[float, int]], num_documents: int) -> dict:
    tokens = sum(count for _, count in sums)
    loss = math.fsum(nll for nll, _ in sums) / tokens
    return {
        "context_length": length,
        "loss": loss,
        "perplexity": finite_exp(loss),
        "num_tokens": tokens,
        "num_documents": num_documents,
    }


def beyond_positions(model: nn.Module, lengths: list[int]) -> str:
    """A warning if lengths exceed ``max_position_embeddings``; otherwise ''."""
    limit = getattr(model.config, "max_position_embeddings", None)
    over = [length for length in lengths if limit and length > limit]
    if not over:
        return ""
    return (
        f"{', '.join(f'{length:,}' for length in over)} tokens are more than max_position_embeddings {limit:,}; "
        "measured anyway"
    )
