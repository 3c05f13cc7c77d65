"""The model as it is trained: weights loaded, layers frozen per stage, dtypes set, loss fused on.

Leaves to ``flare.nope`` what a NoPE layer is, and to ``flare.distributed`` how ranks share the work.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from flare.checkpoint.tensor_files import TensorReader, restore_weights
from flare.distributed.fsdp import is_sharded, materialise, shard_model
from flare.distributed.process_group import World, on_main
from flare.model.activation_checkpointing import recompute_layer
from flare.model.attention import KERNELS, document_mask
from flare.model.compile import uncompiled
from flare.model.linear_cross_entropy import linear_cross_entropy_sum, score_tokens
from flare.model.memory_efficient_layers import save_less
from flare.nope.canary.file import CANARY_FILE
from flare.nope.canary.measure import hold_to_canary
from flare.nope.load import empty_causal_lm, load_causal_lm
from flare.plan.trainable import Trainable

HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions whose matmuls run in 16 bits. fp16 also needs its loss scaled: see ``flare.optim.loss_scale``."""


class TrainingModel(torch.nn.Module):
    """A causal LM whose forward pass is the summed loss of a batch of packed rows.

    Position ids that restart tell document boundaries. Attention gets them as a mask, or as bounds where a kernel
    takes these (see ``flare.model.attention``).

    Args:
        half_dtype: bf16 or fp16, in which matmuls run under autocast; None: fp32.
        documents: rows may hold several documents (``document`` packing); else attention is plainly causal.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, half_dtype: torch.dtype | None = None, documents: bool = True
    ) -> None:
        super().__init__()
        save_less(causal_lm)
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
        """Per target: NLL (nats) and whether it is the argmax, both (B, T). Arguments as ``forward``."""
        with uncompiled(self):
            hidden, weight = self._final_hidden(input_ids, position_ids, document_bounds)
        losses, hits = score_tokens(hidden, weight, labels.flatten())
        return losses.view_as(labels), hits.view_as(labels)

    def _final_hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, bounds: torch.Tensor | None) -> tuple:
        """((B*T, H) hidden states in the compute dtype, (V, H) head weight as it is held)."""
        weight = self.causal_lm.get_output_embeddings().weight
        # A sharded model gathers its weights in the dtype that it computes in.
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
        """The decoder's own outputs, without the head: the way in for those who look at hidden states."""
        return self.causal_lm.get_decoder()(**inputs)

    def _attention_arguments(self, position_ids: torch.Tensor, bounds: torch.Tensor | None) -> dict:
        """What the decoder is told about documents. A dictionary of masks is used by it as it is."""
        implementation = self.causal_lm.config._attn_implementation
        if implementation in KERNELS.values() and bounds is not None:
            return {"attention_mask": {"full_attention": None}, "document_bounds": bounds}
        if implementation == "eager":
            return {}  # it wants another kind of mask, which transformers makes
        return {"attention_mask": {"full_attention": self._mask(position_ids)}}

    def _mask(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        """None where attention is plainly causal, for which SDPA has a faster kernel."""
        if not self.documents:
            return None
        may_ask = position_ids.device.type == "cpu" and not self.compiled  # elsewhere asking costs a host sync
        if may_ask and not (position_ids[:, 1:] == 0).any():
            return None
        return document_mask(position_ids)

    def trainable_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name in the causal LM, parameter) of all that trains; a tied weight once."""
        return ((n, p) for n, p in self.causal_lm.named_parameters() if p.requires_grad)


def load_for_training(
    directory: Path,
    config: dict,
    trainable: Trainable,
    precision: str,
    attn_implementation: str,
    documents: bool = True,
) -> TrainingModel:
    """Load a checkpoint with the NoPE layers of ``config`` and make it ready to train, on the CPU.

    Args:
        config: the config.json to open the weights with (see ``nope.format.with_nope``).
        precision: bf16 or fp16 (frozen weights in it, trainable ones fp32 masters), or fp32.
        attn_implementation: eager, or else SDPA until ``attention.use_kernel`` says otherwise.
        documents: as ``TrainingModel``.
    Raises: CheckpointError for damaged weights, or a model that is not the one of its canary.
    """
    causal_lm = load_causal_lm(directory, attn_implementation=attention_for(attn_implementation), config_dict=config)
    hold_to_canary(causal_lm, directory)  # in the stored dtype; below, frozen weights may be rounded
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
    """The same on this rank's device, each weight read straight into the place and the dtype that it trains in.

    Args: as ``load_for_training``; sharded: divide it among the ranks, each of which reads its part of the files only.
    Raises: CheckpointError for missing or misfitting tensors, or a model that is not the one of its canary.
    """
    if (directory / CANARY_FILE).is_file():  # no rank has the whole model later
        on_main(world, lambda: hold_to_canary(load_causal_lm(directory), directory))
    causal_lm = empty_causal_lm(directory, config, attention_for(attn_implementation))
    model = _ready(causal_lm, trainable, precision, documents)
    if sharded:
        shard_model(model, world)
    materialise(model, world.device)
    restore_weights(causal_lm, TensorReader.of_model(directory))
    return model


def attention_for(attn_implementation: str) -> str:
    """What ``--attn_implementation`` means to transformers until ``attention.use_kernel`` says otherwise."""
    return "eager" if attn_implementation == "eager" else "sdpa"


def _ready(causal_lm: PreTrainedModel, trainable: Trainable, precision: str, documents: bool) -> TrainingModel:
    set_trainable(causal_lm, trainable, precision)
    causal_lm.train()
    return TrainingModel(causal_lm, HALF_DTYPES.get(precision), documents)


def set_trainable(causal_lm: PreTrainedModel, trainable: Trainable, precision: str) -> None:
    """Freeze all but ``trainable`` and give every weight its dtype.

    Nothing below the lowest trainable layer needs a gradient, so autograd records nothing there.
    """
    frozen_dtype = HALF_DTYPES.get(precision, torch.float32)
    for name, parameter in causal_lm.named_parameters():
        parameter.requires_grad_(trainable.covers(name))
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen_dtype)


def checkpoint_layers(causal_lm: PreTrainedModel, selective: bool = False) -> list[int]:
    """Recompute activations in the backward pass of the layers that have one; returns these layers.

    Layers below the lowest trainable one save nothing to begin with: checkpointing them would only cost.
    """
    decoder = causal_lm.get_decoder()
    needs_grad = any(p.requires_grad for p in decoder.embed_tokens.parameters())
    layers = []
    for index, layer in enumerate(decoder.layers):
        needs_grad = needs_grad or any(p.requires_grad for p in layer.parameters())
        if needs_grad:
            recompute_layer(layer, selective)
            layers.append(index)
    return layers
