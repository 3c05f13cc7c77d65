"""The model in training: loads weights, freezes layers, sets dtypes, and computes the loss without full logits.

``flare.nope`` defines NoPE layers, ``flare.model.patches`` patches the loaded model, ``flare.distributed`` divides the
work among ranks.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from flare.checkpoint.tensor_files import TensorReader, restore_weights
from flare.distributed.fsdp import is_sharded, materialize, shard_model
from flare.distributed.process_group import World, run_on_main_rank
from flare.model.attention import KERNELS, document_mask
from flare.model.compile import uncompiled
from flare.model.linear_cross_entropy import linear_cross_entropy_sum, score_tokens
from flare.nope.canary.file import CANARY_FILE
from flare.nope.canary.measure import check_against_canary
from flare.nope.load import empty_causal_lm, load_causal_lm
from flare.plan.trainable import Trainable

HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions whose matmuls run in 16 bits. fp16 also needs its loss scaled: see ``flare.optim.loss_scale``."""


class TrainingModel(torch.nn.Module):
    """A causal LM whose forward pass is the summed loss of a batch of packed rows.

    Documents begin where position ids restart. Attention gets the boundaries as a mask, or as bounds for kernels that
    take bounds (see ``flare.model.attention``).

    Args:
        half_dtype: bf16 or fp16: the dtype of matmuls under autocast; None: fp32.
        documents: rows may hold several documents (``document`` packing). Otherwise attention is only causal.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, half_dtype: torch.dtype | None = None, documents: bool = True
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.half_dtype = half_dtype
        self.documents = documents
        self.compiled = False

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        document_bounds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum of NLLs (nats, fp32) over the targets. (B, T) int64 each; ``document_bounds`` (N + 1,) int32."""
        hidden, weight = self._final_hidden(input_ids, position_ids, document_bounds)
        return linear_cross_entropy_sum(hidden, weight, labels.flatten())

    @torch.no_grad()
    def score(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        document_bounds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For each target: NLL (nats) and whether it is the argmax, both (B, T). Arguments as in ``forward``."""
        with uncompiled(self):
            hidden, weight = self._final_hidden(input_ids, position_ids, document_bounds)
        losses, hits = score_tokens(hidden, weight, labels.flatten())
        return losses.view_as(labels), hits.view_as(labels)

    def _final_hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, bounds: torch.Tensor | None) -> tuple:
        """((B*T, H) hidden states in the compute dtype, (V, H) head weight in its own dtype)."""
        weight = self.causal_lm.get_output_embeddings().weight
        # A sharded model gathers its weights in the compute dtype.
        autocast = self.half_dtype is not None and not is_sharded(self)
        with torch.autocast(input_ids.device.type, self.half_dtype, enabled=autocast):
            outputs = self.causal_lm.get_decoder()(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=False,
                **self._attention_arguments(position_ids, bounds),
            )
        hidden = outputs.last_hidden_state.flatten(0, 1)
        return hidden.to(self.half_dtype or weight.dtype), weight

    def decode(self, **inputs: object) -> BaseModelOutputWithPast:
        """The outputs of the decoder, without the head, for callers that need hidden states."""
        return self.causal_lm.get_decoder()(**inputs)

    def _attention_arguments(self, position_ids: torch.Tensor, bounds: torch.Tensor | None) -> dict:
        """The decoder's arguments about documents. The decoder uses a dictionary of masks unchanged."""
        implementation = self.causal_lm.config._attn_implementation
        if implementation in KERNELS.values() and bounds is not None:
            return {"attention_mask": {"full_attention": None}, "document_bounds": bounds}
        if implementation == "eager":
            return {}  # it needs another kind of mask, which transformers makes
        return {"attention_mask": {"full_attention": self._mask(position_ids)}}

    def _mask(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        """None where attention is only causal: SDPA has a faster kernel for that."""
        if not self.documents:
            return None
        may_read = position_ids.device.type == "cpu" and not self.compiled  # on a GPU, reading is a host sync
        if may_read and not (position_ids[:, 1:] == 0).any():
            return None
        return document_mask(position_ids)

    def trainable_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name in the causal LM, parameter) of all trainable parameters; a tied weight once."""
        return ((n, p) for n, p in self.causal_lm.named_parameters() if p.requires_grad)


def load_for_training(
    directory: Path,
    config: dict,
    trainable: Trainable,
    precision: str,
    attn_implementation: str,
    documents: bool = True,
) -> TrainingModel:
    """Load a checkpoint with the NoPE layers of ``config`` for training, on the CPU.

    Args:
        config: the config.json to open the weights with (see ``config_json.with_nope``).
        precision: bf16 or fp16 (the dtype of frozen weights; trainable ones are fp32 masters), or fp32.
        attn_implementation: eager; anything else is SDPA until ``apply_patches``.
        documents: as in ``TrainingModel``.
    Raises: CheckpointError for damaged weights, or a model that is not the one of its canary.
    """
    causal_lm = load_causal_lm(directory, attn_implementation=attention_for(attn_implementation), config_dict=config)
    check_against_canary(causal_lm, directory)  # before frozen weights are rounded
    return _ready(causal_lm, trainable, precision, documents)


def load_in_place(
    directory: Path,
    config: dict,
    trainable: Trainable,
    precision: str,
    attn_implementation: str,
    world: World,
    documents: bool = True,
    sharded: bool = True,
) -> TrainingModel:
    """``load_for_training`` on this rank's device, with each weight read directly into its training dtype.

    Args: as in ``load_for_training``; sharded: divide the model among ranks, each of which reads only its own part.
    Raises: CheckpointError for missing or misfitting tensors, or a model that is not the one of its canary.
    """
    if (directory / CANARY_FILE).is_file():  # later no rank has the complete model
        run_on_main_rank(world, lambda: check_against_canary(load_causal_lm(directory), directory))
    causal_lm = empty_causal_lm(directory, config, attention_for(attn_implementation))
    model = _ready(causal_lm, trainable, precision, documents)
    if sharded:
        shard_model(model, world)
    materialize(model, world.device)
    restore_weights(causal_lm, TensorReader.of_model(directory))
    return model


def attention_for(attn_implementation: str) -> str:
    """transformers' name for ``--attn_implementation``, as the model is loaded; ``apply_patches`` sets a kernel."""
    return "eager" if attn_implementation == "eager" else "sdpa"


def _ready(causal_lm: PreTrainedModel, trainable: Trainable, precision: str, documents: bool) -> TrainingModel:
    set_trainable(causal_lm, trainable, precision)
    causal_lm.train()
    return TrainingModel(causal_lm, HALF_DTYPES.get(precision), documents)


def set_trainable(causal_lm: PreTrainedModel, trainable: Trainable, precision: str) -> None:
    """Freeze all weights except ``trainable`` and set the dtype of every weight.

    Nothing below the lowest trainable layer needs a gradient, so autograd records nothing there.
    """
    frozen_dtype = HALF_DTYPES.get(precision, torch.float32)
    for name, parameter in causal_lm.named_parameters():
        parameter.requires_grad_(trainable.covers(name))
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen_dtype)
