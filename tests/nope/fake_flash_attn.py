"""A stand-in for the package flash-attn on machines without a GPU, so that transformers' own way to it runs there.

The two kernels that a model is run with, by flash-attn 2.8's signatures (transformers reads the names of their
parameters) and documentation, in float64. What transformers does around them is its own: unpadding by the mask,
bounds of packed documents from position ids, casts, caches. Arguments that no model of ours may pass fail.
Source: https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/flash_attn/flash_attn_interface.py
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel, modeling_flash_attention_utils

PACKAGE = "flash_attn"


class FakeFlashAttn:
    """What the kernels were called with: ``bounds`` has the queries' sequence bounds of each call (None: a call by
    rows of one length), ``dtypes`` the dtypes of what they were given."""

    def __init__(self) -> None:
        self.bounds: list[list[int] | None] = []
        self.dtypes: set[torch.dtype] = set()

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        """q: (B, Tq, heads, D), k and v: (B, Tk, key heads, D) -> (B, Tq, heads, D)."""
        self._check(q, k, v, dropout_p, window_size, softcap, alibi_slopes, return_attn_probs)
        self.bounds.append(None)
        return torch.stack([attend(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        """q: (tokens, heads, D), k and v: (tokens, key heads, D), sequences one after the other between bounds."""
        self._check(q, k, v, dropout_p, window_size, softcap, alibi_slopes, return_attn_probs or block_table)
        lengths = []
        for tensor, bounds, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
            assert bounds.dtype == torch.int32
            assert (bounds[0], bounds[-1]) == (0, len(tensor))
            assert bounds.diff().max() <= longest  # the kernel computes nothing beyond
            lengths.append(bounds.diff().tolist())
        self.bounds.append(cu_seqlens_q.tolist())
        rows = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
        return torch.cat([attend(*row, softmax_scale, causal) for row in rows])

    def flash_attn_with_kvcache(self, *_args, **_kwargs):
        raise AssertionError("for paged caches only")

    def _check(self, q, k, v, dropout_p, window_size, softcap, alibi_slopes, other) -> None:
        assert q.dtype == k.dtype == v.dtype
        self.dtypes.add(q.dtype)
        assert (dropout_p, window_size, softcap, alibi_slopes) == (0.0, (-1, -1), 0.0, None)
        assert not other


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, causal: bool
) -> torch.Tensor:
    """One sequence. Causal means from the end: the last query sees all keys."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1).double() for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * (scale or query.shape[-1] ** -0.5)
    if causal:
        unseen = scores.new_ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(key) - len(query))
        scores = scores.masked_fill(unseen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).to(query.dtype)


def install(monkeypatch: pytest.MonkeyPatch) -> FakeFlashAttn:
    """Make transformers take the stand-in for flash-attn 2, until the end of the test."""
    utils, kernels = modeling_flash_attention_utils, FakeFlashAttn()
    package, padding = ModuleType(PACKAGE), ModuleType(f"{PACKAGE}.bert_padding")
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        setattr(package, name, getattr(kernels, name))
    package.__spec__ = ModuleSpec(PACKAGE, None)
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input  # transformers' copies of them
    monkeypatch.setitem(sys.modules, PACKAGE, package)
    monkeypatch.setitem(sys.modules, padding.__name__, padding)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda *_, **__: True)
    monkeypatch.setattr(utils, "_loaded_implementation", None)  # it imports once only
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)  # needs a GPU
    return kernels
