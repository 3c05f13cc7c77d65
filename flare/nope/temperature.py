"""Attention temperature of NoPE layers: a constant factor on their scores, folded into weights.

A NoPE layer's scores are linear in its queries, and in the weight of the projection (Qwen2) or of the norm (Qwen3)
that computes the queries. So the factor needs no code at run time and works in every runtime. Powers of two are
exact in every dtype; other factors are exact up to one rounding of the stored dtype.
"""

import math

import torch

from flare.errors import CheckpointError, ConfigError
from flare.nope.tensor_names import query_tensors


def check_temperature(beta: float) -> float:
    """Raises: ConfigError for a factor that is not a positive number, or that is 1."""
    if not math.isfinite(beta) or beta <= 0:
        raise ConfigError(f"--nope_temperature {beta:g} must be a number above 0")
    if beta == 1:
        raise ConfigError("--nope_temperature 1 changes nothing; leave it out")
    return float(beta)


def scaled(name: str, tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """``tensor * factor`` with one rounding, to the tensor's own dtype.

    Raises: CheckpointError when a value does not fit that dtype.
    """
    product = (tensor.double() * factor).to(tensor.dtype)
    if not product.isfinite().all() and tensor.isfinite().all():
        raise CheckpointError(f"{name} times {factor:g} is too large for {tensor.dtype}")
    return product


@torch.no_grad()
def fold_temperature(model: torch.nn.Module, family: str, layers: list[int], beta: float) -> None:
    """Multiply the attention scores of these layers of a loaded causal LM by ``beta``, in its weights."""
    for name in query_tensors(family, layers):
        parameter = model.get_parameter(name)
        parameter.copy_(scaled(name, parameter, beta))
