"""What an evaluation during training measures besides the loss: the length curve, and once what the base would have.

Knows the model, not the trainer; ``flare.train.session`` puts the two together.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from flare.data.mixture import MixedRows
from flare.data.packing import Batch, PackedRows
from flare.data.training_rows import IGNORE_INDEX
from flare.distributed.fsdp import is_sharded
from flare.distributed.process_group import World
from flare.errors import ConfigError
from flare.evaluation.scoring.batches import Engine
from flare.evaluation.scoring.context import score_tails
from flare.evaluation.scoring.scorer import evaluating
from flare.model.inputs import host_tensors, to_device
from flare.nope.canary.measure import rope_everywhere

MAX_DOCUMENTS = 64
"""Long held-out documents that the curve is made of: an evaluation must stay short beside training."""


class TrainingScorer:
    """Scores with a model as it is trained: its precision, its kernels, its shards.

    Args:
        training_model: ``flare.model.training_model.TrainingModel``, on ``device``.
    """

    def __init__(self, training_model: nn.Module, device: torch.device) -> None:
        self.training_model, self.device = training_model, device
        self.model = training_model.causal_lm

    def score(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``scorer.TokenScorer.score``: NLL and hits of the asked targets in row-major order, on the CPU."""
        asked = labels != IGNORE_INDEX
        positions = np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape).copy()
        batch = Batch(input_ids.numpy(), labels.numpy(), positions)
        with evaluating(self.training_model):
            losses, hits = self.training_model.score(**to_device(host_tensors(batch), self.device))
        return losses.cpu()[asked].float(), hits.cpu()[asked]


class LengthCurve:
    """The loss of the last tokens of long held-out documents, by context length.

    Args:
        training_model: on its device. rows: the held-out rows; their documents are looked at whole.
    Raises: ConfigError when no held-out document holds the longest context.
    """

    def __init__(
        self,
        training_model: nn.Module,
        rows: PackedRows | MixedRows,
        lengths: list[int],
        batch_tokens: int,
        world: World,
    ) -> None:
        scorer = TrainingScorer(training_model, world.device)
        self.engine = Engine(scorer, batch_tokens, world, equal_rounds=is_sharded(training_model))
        self.lengths = lengths
        self.sequences = long_documents(rows, max(lengths))

    def __call__(self) -> list[dict]:
        """Rows of ``score_tails``; a collective."""
        return score_tails(self.engine, self.sequences, self.lengths)


def long_documents(rows: PackedRows | MixedRows, num_tokens: int) -> list[list[int]]:
    """``[end-of-text, tokens...]`` of the first documents with so many tokens, without the end-of-text behind them;
    of several data sets equally many.

    Raises: ConfigError when there is none.
    """
    parts = rows.parts if isinstance(rows, MixedRows) else [rows]
    found = [sequence for part in parts for sequence in _first_long(part, num_tokens, MAX_DOCUMENTS // len(parts))]
    if not found:
        longest = max(int(_lengths(part).max(initial=0)) for part in parts)
        raise ConfigError(
            f"--eval_context_lengths {num_tokens}: the longest held-out document has {longest} tokens; give shorter "
            "lengths, or hold out more with --validation_split_percentage"
        )
    return found


def _lengths(rows: PackedRows) -> np.ndarray:
    """Tokens of each document, the end-of-text not counted."""
    return rows.starts[1:] - rows.starts[:-1] - 1


def _first_long(rows: PackedRows, num_tokens: int, limit: int) -> list[list[int]]:
    lengths, first, tokens = _lengths(rows), rows.first, rows.cache.tokens
    long = np.flatnonzero(lengths >= num_tokens)[: max(limit, 1)]
    return [[rows.cache.end_of_text_id, *tokens[first[d] : first[d] + lengths[d]].tolist()] for d in long]


class MoreEvaluation:
    """Additions to the record of an evaluation.

    Args:
        curve: the length curve, if one is asked for.
        from_base: whether at step 0 the weights are the base's, RoPE removed from some layers and nothing else: then
            the loss with RoPE everywhere is the base's own, on the very rows of every later evaluation.
    """

    def __init__(self, model: nn.Module, curve: LengthCurve | None, from_base: bool) -> None:
        self.model, self.curve, self.from_base = model, curve, from_base

    @torch.no_grad()
    def __call__(self, step: int, held_out_loss: Callable[[], float]) -> dict:
        """``eval_context_lengths``, and at step 0 ``rope_eval_loss``; a collective."""
        record = {}
        if self.curve is not None:
            record["eval_context_lengths"] = self.curve()
        if step == 0 and self.from_base:
            with rope_everywhere(self.model):
                record["rope_eval_loss"] = held_out_loss()
        return record
