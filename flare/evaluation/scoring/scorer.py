"""NLL and argmax hits of target tokens for any causal LM of transformers.

Other modules decide which tokens are scored and how scores are summed.
"""

import contextlib
import inspect
import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import nn

from flare.data.training_rows import IGNORE_INDEX
from flare.errors import ConfigError, FlareError
from flare.model.linear_cross_entropy import score_tokens
from flare.plan.loss_chunks import loss_chunk_rows

log = logging.getLogger("flare")

PROBE_TOKENS = 8


class TokenScorer:
    """Per-token NLL (fp32, nats) and argmax hits of a causal LM of transformers.

    Args:
        model: on its device(s); ``device`` is the device of its input ids.
        probe_ids: (n,) some token ids of the data, used to test whether the logits are ``lm_head(hidden)``. If so,
            full logits are never stored. Otherwise (a bias, Gemma's soft-capping, the scale of Granite or Cohere)
            they are computed from the first scored target on, and ``fused`` is False.

    Raises: ConfigError when the token ids do not belong to this model's vocabulary.
    """

    def __init__(self, model: nn.Module, device: torch.device | str, probe_ids: list[int]) -> None:
        self.model = model
        self.device = torch.device(device)
        self.fused = self._logits_are_linear(probe_ids[:PROBE_TOKENS])
        self.keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        if not self.fused:
            log.info("evaluation: the logits of %s are not lm_head(hidden); computing full logits", _name(model))

    def score(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the targets of one batch.

        Args:
            input_ids: (B, T) int64, padded on the right with any token. No attention mask is needed: a
                causal model's position t sees positions 0..t only, so nothing real ever sees the padding.
            labels: (B, T) int64; ``labels[b, t]`` is the token after ``input_ids[b, t]`` (shifted
                already), ``IGNORE_INDEX`` for positions that are not scored.

        Returns: NLL fp32 and argmax hits bool of the n scored targets in row-major order: (n,), (n,), on
            the CPU.
        Raises: FlareError when the device runs out of memory.
        """
        scored = labels != IGNORE_INDEX
        try:
            with evaluating(self.model):
                score = self._score_fused if self.fused else self._score_full
                losses, hits = score(input_ids.to(self.device), scored.to(self.device), labels[scored])
        except torch.OutOfMemoryError as error:
            batch_size, length = input_ids.shape
            shape = f"batch size {batch_size} x {length} tokens"
            raise FlareError(f"out of memory on {self.device} at {shape}; lower --batch_size") from error
        return losses.cpu(), hits.cpu()

    def _score_fused(
        self, input_ids: torch.Tensor, scored: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = self.model.get_output_embeddings()
        hidden = self._hidden(input_ids)
        # Under a device_map, decoder and lm_head may be on different devices, and the weight of the head may be
        # offloaded until it is used. Everything is moved to the device of the head.
        with align_module_device(head):
            weight = head.weight
            rows = hidden[scored.to(hidden.device)].to(weight.device)
            return score_tokens(rows, weight, targets.to(weight.device))

    def _score_full(
        self, input_ids: torch.Tensor, scored: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A passkey scores a few tokens after a long context; logits of the context could fill the GPU.
        keep = {"logits_to_keep": input_ids.shape[1] - int(scored.any(0).int().argmax())} if self.keeps_last else {}
        logits = self.model(input_ids, use_cache=False, **keep).logits
        rows, targets = logits[scored[:, -logits.shape[1] :].to(logits.device)], targets.to(logits.device)
        losses, hits = [], []
        size = loss_chunk_rows(rows.shape[-1], rows.is_cuda)
        # fp32 copies need the most memory, so they are made for one chunk of rows at a time.
        for chunk, wanted in zip(rows.split(size), targets.split(size), strict=True):
            chunk = chunk.float()
            losses.append(F.cross_entropy(chunk, wanted, reduction="none"))
            hits.append(chunk.argmax(-1) == wanted)
        return torch.cat(losses), torch.cat(hits)

    def _hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, H), the input of the lm_head."""
        output = self.model.get_decoder()(input_ids=input_ids, use_cache=False)
        return output[0]

    def _logits_are_linear(self, probe_ids: list[int]) -> bool:
        """Whether the model's logits equal ``hidden @ weight.T`` bit for bit on a few tokens.

        The same matrix product on the same shapes is bit-equal in every dtype. A test with a tolerance would miss a
        soft cap, which changes small logits very little.
        """
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or self.model.get_decoder() is self.model:
            return False
        input_ids = torch.tensor([probe_ids], device=self.device)
        with evaluating(self.model):
            try:
                hidden = self._hidden(input_ids)
                logits = self.model(input_ids, use_cache=False).logits
                with align_module_device(head):
                    expected = F.linear(hidden.to(head.weight.device), head.weight)
                    return torch.equal(expected.float(), logits.to(expected.device).float())
            except (TypeError, RuntimeError, AttributeError, IndexError) as error:
                # An unusual decoder (other arguments, or another width than the head): use the complete model, which
                # raises again if the model itself has an error.
                log.debug("fused scoring is not possible for %s: %s", _name(self.model), error)
                return False


def check_vocabulary(model: nn.Module, highest_id: int) -> None:
    """Check that the embedding has a row for every token id; CUDA would fail with a device-side assert.

    Raises: ConfigError if the tokenizer belongs to another model.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if highest_id >= rows:
        raise ConfigError(
            f"the tokenizer does not belong to the model: token id {highest_id}, but {_name(model)} has "
            f"{rows} embeddings; give a model directory with its own tokenizer"
        )


def check_length(model: nn.Module, length: int) -> None:
    """Check windows against the table of learned positions (GPT-2, OPT). RoPE has no such limit.

    Raises: ConfigError if windows are longer.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if not positions or length <= positions:
        return
    words = model.get_input_embeddings()
    learned = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words)
    # The table of OPT has two more rows than positions.
    if any(positions <= table.num_embeddings <= positions + 2 for table in learned):
        raise ConfigError(
            f"{length} tokens: {_name(model)} has learned positions for {positions} only; lower --max_length or "
            "--context_lengths"
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the previous mode is restored.

    ``no_grad`` instead of ``inference_mode``, because buffers that the model creates here (such as RoPE frequencies
    for a new length) must be usable in training later.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _name(model: nn.Module) -> str:
    return getattr(model.config, "model_type", type(model).__name__)
