"""Attention that stops at document boundaries: as a mask for SDPA, as sequence bounds for flash kernels.

Masks and bounds are passed to the decoder. transformers would derive them from the position ids in every forward
pass, and for that read from the device whether a row has several documents: a host sync, and sometimes a new graph.

The kernels are registered with transformers under our own names. Without bounds (the NoPE probe, generation) they
call SDPA.
"""

import inspect

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

KERNELS = {"varlen": "flare_varlen", "flash_attention_2": "flare_flash_attention_2"}
"""``--attn_implementation`` -> the name under which our function is registered with transformers."""

TOKENS_PER_DOCUMENT = 256
"""Bounds are padded to one document per this many tokens, to keep their shape; more documents double their length.
Empty documents cost something: the kernel starts blocks for each one, and its backward pass keeps 128 fp32 rows of q's
gradient for it. Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp."""


def document_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """True where a query attends: earlier tokens of its own document, and itself. (B, T) -> (B, 1, T, T) bool."""
    documents = (position_ids == 0).cumsum(-1)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    length = position_ids.shape[-1]
    return same & torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()


def document_bounds(position_ids: np.ndarray) -> np.ndarray:
    """Where documents begin and end when the rows of a batch are concatenated: (N + 1,) int32, from 0 to B*T.

    A row's first token begins a document, also when the row begins inside one. Padded with empty documents at the end.
    The length depends only on B*T, unless documents are shorter than ``TOKENS_PER_DOCUMENT`` on average.
    """
    starts = position_ids == 0
    starts[:, 0] = True
    bounds = np.append(np.flatnonzero(starts), position_ids.size)
    room = max(position_ids.size // TOKENS_PER_DOCUMENT, len(position_ids)) + 1
    while room < len(bounds):
        room = 2 * room - 1
    return np.pad(bounds, (0, room - len(bounds)), constant_values=position_ids.size).astype(np.int32)


def use_kernel(causal_lm: torch.nn.Module, implementation: str) -> list[int]:
    """Let all layers of a loaded model compute attention with a kernel, wherever they get document bounds.

    Args:
        implementation: a key of ``KERNELS``.
    Returns: indices of the layers that use it.
    """
    attend = {"varlen": _varlen, "flash_attention_2": _flash_attention_2}[implementation]
    AttentionInterface.register(KERNELS[implementation], attend)
    causal_lm.config._attn_implementation = KERNELS[implementation]
    layers = enumerate(causal_lm.get_decoder().layers)
    return [index for index, layer in layers if layer.self_attn.config._attn_implementation == KERNELS[implementation]]


def _varlen(module, query, key, value, attention_mask, **kwargs):
    """torch's own flash kernel. query (B, heads, T, D), key and value (B, kv heads, T, D) -> (B, T, heads, D)."""
    return _attend(_torch_varlen, module, query, key, value, attention_mask, **kwargs)


def _flash_attention_2(module, query, key, value, attention_mask, **kwargs):
    """The flash-attn package's kernel; shapes as in ``_varlen``."""
    return _attend(_flash_attn_varlen, module, query, key, value, attention_mask, **kwargs)


def _attend(kernel, module, query, key, value, attention_mask, document_bounds=None, **kwargs):
    if document_bounds is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch, heads, length, width = query.shape
    # Under autocast v is in the compute dtype; RoPE may have turned q and k into fp32.
    packed = [x.transpose(1, 2).reshape(batch * length, -1, width).to(value.dtype) for x in (query, key, value)]
    output = kernel(*packed, document_bounds, length, kwargs.get("scaling"))
    return output.view(batch, length, heads, width), None


def _torch_varlen(query, key, value, bounds, longest, scale):
    """(B*T, heads, D) each. ``longest`` is the length of a row, not of the longest document: a constant."""
    from torch.nn.attention.varlen import varlen_attn

    # The kernel shares key-value heads in every torch; from 2.12 on the function needs a flag for it.
    grouped = {"enable_gqa": True} if NEEDS_ENABLE_GQA and query.shape[1] != key.shape[1] else {}
    return varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **grouped
    )


def _flash_attn_varlen(query, key, value, bounds, longest, scale):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, bounds, bounds, longest, longest, softmax_scale=scale, causal=True
    )


def _needs_enable_gqa() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


NEEDS_ENABLE_GQA = _needs_enable_gqa()
"""Resolved at import, because compiled code cannot inspect a signature."""
