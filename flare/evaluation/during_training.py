"""Additional measurements during training: loss by context length, and once the loss of the base.

Independent of the trainer; ``flare.train.session`` connects the two.
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
"""Long held-out documents for the curve; few, so that an evaluation is short compared with training."""


class TrainingScorer:
    """Scores with the model that is being trained, with its precision, kernels and shards.

    Args:
        training_model: ``flare.model.training_model.TrainingModel``, on ``device``.
    """

    def __init__(self, training_model: nn.Module, device: torch.device) -> None:
        self.training_model, self.device = training_model, device
        self.model = training_model.causal_lm

    def score(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``scorer.TokenScorer.score``: NLL and hits of the scored targets in row-major order, on the CPU."""
        scored = labels != IGNORE_INDEX
        positions = np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape).copy()
        batch = Batch(input_ids.numpy(), labels.numpy(), positions)
        with evaluating(self.training_model):
            losses, hits = self.training_model.score(**to_device(host_tensors(batch), self.device))
        return losses.cpu()[scored].float(), hits.cpu()[scored]


class LengthCurve:
    """The loss of the last tokens of long held-out documents, by context length.

    Args:
        training_model: on its device. rows: the held-out rows, of which complete documents are used.
    Raises: ConfigError if every held-out document is shorter than the longest context.
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
    """``[end-of-text, tokens...]`` of the first documents with at least ``num_tokens`` tokens, without the final
    end-of-text token. Several data sets contribute equally many.

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
    """Tokens of each document without the end-of-text token."""
    return rows.starts[1:] - rows.starts[:-1] - 1


def _first_long(rows: PackedRows, num_tokens: int, limit: int) -> list[list[int]]:
    lengths, first, tokens = _lengths(rows), rows.first, rows.cache.tokens
    long = np.flatnonzero(lengths >= num_tokens)[: max(limit, 1)]
    return [[rows.cache.end_of_text_id, *tokens[first[d] : first[d] + lengths[d]].tolist()] for d in long]


class MoreEvaluation:
    """Additions to the record of an evaluation.

    Args:
        curve: the loss by context length, or None.
        from_base: whether the weights at step 0 are those of the base. Then the loss with RoPE in every layer is the
            loss of the base on the rows of all later evaluations.
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
