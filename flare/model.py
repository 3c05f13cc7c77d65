"""The model as it is trained: weights loaded, layers frozen per stage, dtypes set, loss fused on.

Leaves to ``flare.nope`` what a NoPE layer is, to ``flare.distributed`` and ``flare.sharding`` how ranks share the
work.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from flare.distributed import World
from flare.loss import linear_cross_entropy_sum, score_tokens
from flare.nope.load import empty_causal_lm, load_causal_lm
from flare.sharding import is_sharded, materialise, shard_model
from flare.tensor_files import TensorReader, restore_weights
from flare.trainable import Trainable


class TrainingModel(torch.nn.Module):
    """A causal LM whose forward pass is the summed loss of a batch of packed rows.

    Attention is told document boundaries through position ids that restart; a 2-D attention mask would
    switch transformers' detection of them off.
    """

    def __init__(self, causal_lm: PreTrainedModel, bf16: bool = False) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.bf16 = bf16

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Sum of NLLs (nats, fp32) over the targets. All arguments (B, T) int64."""
        hidden, weight = self._final_hidden(input_ids, position_ids)
        return linear_cross_entropy_sum(hidden, weight, labels.flatten())

    @torch.no_grad()
    def score(
        self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Per target: NLL (nats) and whether it is the argmax, both (B, T)."""
        hidden, weight = self._final_hidden(input_ids, position_ids)
        losses, hits = score_tokens(hidden, weight, labels.flatten())
        return losses.view_as(labels), hits.view_as(labels)

    def _final_hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> tuple:
        """((B*T, H) hidden states in the compute dtype, (V, H) head weight as it is held)."""
        weight = self.causal_lm.get_output_embeddings().weight
        # A sharded model gathers its weights in the dtype that it computes in.
        autocast = self.bf16 and not is_sharded(self)
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=autocast):
            outputs = self.causal_lm.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden = outputs.last_hidden_state.flatten(0, 1)
        dtype = torch.bfloat16 if self.bf16 else weight.dtype
        return hidden.to(dtype), weight

    def decode(self, **inputs: object) -> BaseModelOutputWithPast:
        """The decoder's own outputs, without the head: the way in for those who look at hidden states."""
        return self.causal_lm.get_decoder()(**inputs)

    def trainable_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name in the causal LM, parameter) of all that trains; a tied weight once."""
        return ((n, p) for n, p in self.causal_lm.named_parameters() if p.requires_grad)


def load_for_training(
    directory: Path, config: dict, trainable: Trainable, precision: str, attn_implementation: str
) -> TrainingModel:
    """Load a checkpoint with the NoPE layers of ``config`` and make it ready to train, on the CPU.

    Args:
        config: the config.json to open the weights with (see ``nope.format.with_nope``).
        precision: bf16 (frozen weights in bf16, trainable ones fp32 masters) or fp32.
    """
    attention = attention_for(attn_implementation)
    causal_lm = load_causal_lm(directory, attn_implementation=attention, config_dict=config)
    return _ready(causal_lm, trainable, precision)


def load_sharded(
    directory: Path, config: dict, trainable: Trainable, precision: str, attn_implementation: str, world: World
) -> TrainingModel:
    """The same, divided among the ranks and on their devices; each rank reads its part of the files only.

    Raises: CheckpointError for missing or misfitting tensors.
    """
    causal_lm = empty_causal_lm(directory, config, attention_for(attn_implementation))
    model = _ready(causal_lm, trainable, precision)
    shard_model(model, world)
    materialise(model, world.device)
    restore_weights(causal_lm, TensorReader.of_model(directory))
    return model


def attention_for(attn_implementation: str) -> str:
    """What ``--attn_implementation`` means to transformers."""
    return "sdpa" if attn_implementation == "auto" else attn_implementation


def _ready(causal_lm: PreTrainedModel, trainable: Trainable, precision: str) -> TrainingModel:
    set_trainable(causal_lm, trainable, precision)
    causal_lm.train()
    return TrainingModel(causal_lm, bf16=precision == "bf16")


def set_trainable(causal_lm: PreTrainedModel, trainable: Trainable, precision: str) -> None:
    """Freeze all but ``trainable`` and give every weight its dtype.

    Nothing below the lowest trainable layer needs a gradient, so autograd records nothing there.
    """
    frozen_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for name, parameter in causal_lm.named_parameters():
        parameter.requires_grad_(trainable.covers(name))
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen_dtype)


def checkpoint_layers(causal_lm: PreTrainedModel) -> list[int]:
    """Recompute activations in the backward pass of the layers that have one; returns these layers.

    Layers below the lowest trainable one save nothing to begin with: checkpointing them would only cost.
    """
    decoder = causal_lm.get_decoder()
    needs_grad = any(p.requires_grad for p in decoder.embed_tokens.parameters())
    layers = []
    for index, layer in enumerate(decoder.layers):
        needs_grad = needs_grad or any(p.requires_grad for p in layer.parameters())
        layer.gradient_checkpointing = needs_grad
        if needs_grad:
            layer._gradient_checkpointing_func = _recompute
            layers.append(index)
    return layers


def _recompute(function: object, *args: object) -> object:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
