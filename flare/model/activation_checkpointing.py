"""Activation checkpointing of decoder layers: in the backward pass a layer computes again what it did not keep.

Full checkpointing keeps only a layer's input. Selective checkpointing also keeps the outputs of matrix products and
of attention, and computes the rest again: norms, RoPE, dtype conversions, silu and its product. All products cost the
same FLOPs per byte kept (the width of their input), so none is a better choice than another; attention costs more.
Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (2016); torch.utils.checkpoint's selective
checkpointing. docs/memory.md has the bytes of both.
"""

from functools import cache, partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

LAST_PRODUCT = 7
"""down_proj, after q, k, v, o, gate and up. Its output is not kept, because nothing in the layer reads it."""


def checkpoint_layers(causal_lm: PreTrainedModel, selective: bool = False) -> list[int]:
    """Checkpoint the layers that have a backward pass. Returns their indices.

    Layers below the lowest trainable one keep nothing for a backward pass: checkpointing them saves no memory.

    Args:
        selective: see the module's docstring.
    """
    decoder = causal_lm.get_decoder()
    needs_grad = any(p.requires_grad for p in decoder.embed_tokens.parameters())
    layers = []
    for index, layer in enumerate(decoder.layers):
        needs_grad = needs_grad or any(p.requires_grad for p in layer.parameters())
        if needs_grad:
            _checkpoint_layer(layer, selective)
            layers.append(index)
    return layers


def _checkpoint_layer(layer: torch.nn.Module, selective: bool) -> None:
    """Replace a layer's ``forward`` by one that is checkpointed in training.

    ``forward`` is replaced, not the call: hooks, such as FSDP2's, then run once, and a compiled graph contains the
    selective policy. Later versions of transformers than 5.17 checkpoint the call. There the compiled graph is inside
    the checkpoint, whose policy sees none of its operations.
    """
    settings = {"context_fn": _contexts} if selective else {}
    forward = layer.forward

    def forward_or_checkpoint(*args: object, **kwargs: object) -> object:
        if not layer.training:
            return forward(*args, **kwargs)
        run = partial(forward, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **settings)

    layer.forward = forward_or_checkpoint


def _contexts() -> tuple:
    return create_selective_checkpoint_contexts(partial(_policy, {}))


def _policy(seen: dict, context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """Whether an operation's output is kept.

    Args:
        seen: counts products, in the forward pass and in the backward pass, where torch 2.11 asks the policy again.
    """
    if op in PRODUCTS:
        seen[context.is_recompute] = seen.get(context.is_recompute, 0) + 1
        if seen[context.is_recompute] < LAST_PRODUCT:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.MUST_SAVE if _is_attention(op) else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _is_attention(op: object) -> bool:
    """Kernels of SDPA, torch's varlen and flash-attn's. Eager attention consists of plain batched products."""
    name = op.name() if isinstance(op, torch._ops.OpOverload) else ""
    return "attention" in name or "attn" in name
