"""RMSNorm and SwiGLU that keep less for the backward pass than transformers' own operations.

The forward pass gives the same bits. The backward pass computes a few element-wise operations again. In bf16 a decoder
layer of Qwen2.5-3B keeps a third less in stage 2 (docs/memory.md). Source: Liger-Kernel's ``rms_norm`` and ``swiglu``,
which are written in Triton; these here are plain torch operations for every device. A compiled layer uses
transformers' own operations, because the compiler chooses by itself what to compute again.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def use_memory_efficient_layers(causal_lm: nn.Module) -> list[int]:
    """Replace the forward pass of all norms and MLPs of a Qwen model; weights, names and outputs stay the same.

    Returns: indices of the layers in which they were replaced.
    """
    decoder = causal_lm.get_decoder()
    _replace(decoder.norm, partial(_rms_norm, narrow=True))
    for layer in decoder.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            _replace(norm, partial(_rms_norm, narrow=True))
        for norm in (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")):  # Qwen3's
            if norm is not None:
                _replace(norm, partial(_rms_norm, narrow=False))
        if causal_lm.config.hidden_act == "silu":  # in all Qwen models
            _replace(layer.mlp, _swiglu_mlp)
    return list(range(len(decoder.layers)))


def _replace(module: nn.Module, forward: object) -> None:
    """Run ``forward(module, x)`` in place of ``module.forward(x)``, except in a compiled layer."""
    original = module.forward

    def either(hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return original(hidden_states)
        return forward(module, hidden_states)

    module.forward = either


def _rms_norm(norm: nn.Module, hidden_states: torch.Tensor, narrow: bool) -> torch.Tensor:
    """(..., H) -> (..., H).

    Args:
        narrow: return autocast's dtype. Otherwise each reader of the output would convert it and keep its own copy.
    """
    device = hidden_states.device.type
    dtype = torch.promote_types(norm.weight.dtype, hidden_states.dtype)
    if narrow and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _RMSNorm.apply(hidden_states, norm.weight, norm.variance_epsilon, dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps its unchanged input, and 1/rms of each row."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        wide = x.to(torch.float32)
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (weight * (wide * inverse).to(x.dtype)).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        normed = x.to(torch.float32) * inverse
        product = normed * grad  # in fp32
        input_grad, weight_grad = None, None
        if ctx.needs_input_grad[1]:
            weight_grad = product.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            wide_weight = weight.to(torch.float32)
            mean = (product @ wide_weight / len(weight)).unsqueeze(-1)
            input_grad = torch.mul(grad, wide_weight).addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype)
        return input_grad, weight_grad, None, None


def _swiglu_mlp(mlp: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(_SwiGLU.apply(mlp.gate_proj(hidden_states), mlp.up_proj(hidden_states)))


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up``. Keeps ``gate`` and ``up``, not ``silu(gate)``."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        gate_grad, up_grad = None, None
        if ctx.needs_input_grad[0]:
            gate_grad = grad * up
            torch.ops.aten.silu_backward.grad_input(gate_grad, gate, grad_input=gate_grad)  # in place
        if ctx.needs_input_grad[1]:
            up_grad = F.silu(gate).mul_(grad)
        return gate_grad, up_grad
