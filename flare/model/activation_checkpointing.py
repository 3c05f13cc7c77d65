"""Gradient checkpointing of a layer: all of its forward pass again in the backward pass, or what is cheap of it.

``selective`` keeps what matrix products and the attention kernel gave and computes the rest again: norms, RoPE,
conversions, silu and its product. Every product costs the same FLOPs per byte kept (its input's width), so there is no
better choice among them; attention costs more. Source: Chen et al., Training Deep Nets with Sublinear Memory Cost
(2016); torch.utils.checkpoint's selective checkpointing; docs/memory.md counts both.
"""

from functools import cache, partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

LAST_PRODUCT = 7
"""down_proj, behind q, k, v, o, gate and up: nothing in the layer reads what it gives."""


def recompute_layer(layer: torch.nn.Module, selective: bool) -> None:
    """Let a layer's forward pass, when it trains, keep its input and be run again in the backward pass.

    ``forward`` itself is replaced: hooks, such as FSDP2's, run once, and what is compiled has the choice in its graph.
    transformers does it so from some version after 5.17 on; there the compiled graph was inside the checkpoint, whose
    choice saw none of its operations.

    Args:
        selective: keep the outputs of matrix products and of attention, too.
    """
    how = {"context_fn": _contexts} if selective else {}
    forward = layer.forward

    def forward_or_checkpoint(*args: object, **kwargs: object) -> object:
        if not layer.training:
            return forward(*args, **kwargs)
        again = partial(forward, **kwargs)
        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **how)

    layer.forward = forward_or_checkpoint


def _contexts() -> tuple:
    return create_selective_checkpoint_contexts(partial(_policy, {}))


def _policy(seen: dict, context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """Whether an operation's output is kept. ``seen`` counts products, in the forward pass and (torch 2.11) in the
    backward pass, which asks again."""
    if op in PRODUCTS:
        seen[context.is_recompute] = seen.get(context.is_recompute, 0) + 1
        if seen[context.is_recompute] < LAST_PRODUCT:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.MUST_SAVE if _is_attention(op) else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _is_attention(op: object) -> bool:
    """Kernels of SDPA, torch's varlen and flash-attn's. Eager attention is made of plain products of batches."""
    name = op.name() if isinstance(op, torch._ops.OpOverload) else ""
    return "attention" in name or "attn" in name
