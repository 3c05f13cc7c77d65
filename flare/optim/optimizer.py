"""Optimizer and schedule. The schedule is a pure function of the step, so it needs no state in a checkpoint."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch
from transformers import get_scheduler

from flare.checkpoint.tensor_files import TensorReader
from flare.config.options import Options
from flare.errors import CheckpointError
from flare.logs import log
from flare.optim.adamw_8bit import (
    MOMENTS,
    build_adamw_8bit,
    dequantize,
    empty_tensors_of_8bit_moment,
    is_8bit,
    quantization_map,
    quantize,
    tensors_of_8bit_moment,
)
from flare.plan.optimizer_state import EIGHT_BIT, block_size


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> list[dict]:
    """Matrices (and embeddings) with weight decay; norms and biases, which are vectors, without."""
    decayed: dict = {"params": [], "names": [], "weight_decay": weight_decay}
    plain: dict = {"params": [], "names": [], "weight_decay": 0.0}
    for name, parameter in named:
        group = decayed if parameter.ndim >= 2 else plain
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in (decayed, plain) if group["params"]]


def build_optimizer(named: Iterable[tuple[str, torch.nn.Parameter]], options: Options) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; each group carries their ``names``."""
    groups = parameter_groups(named, options.weight_decay)
    settings = {"lr": options.learning_rate, "betas": (options.adam_beta1, options.adam_beta2)}
    settings["eps"] = options.adam_epsilon
    if options.optim == EIGHT_BIT:
        return build_adamw_8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=options.optim == "adamw_torch_fused", **settings)


def can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its update obeys ``optimizer.found_inf``, a flag on the device: fused kernels do, as for GradScaler."""
    return bool(optimizer.defaults.get("fused"))


def build_schedule(options: Options, max_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate at a step (0-based), by transformers' schedule of that name."""
    warmup = options.warmup_steps or int(options.warmup_ratio * max_steps)
    probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=options.learning_rate)
    scheduler = get_scheduler(options.lr_scheduler_type, probe, num_warmup_steps=warmup, num_training_steps=max_steps)
    return scheduler.lr_lambdas[0]


def optimizer_step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Update the parameters by their gradients, at this learning rate.

    torchao compiles its update, once for each shape of a parameter; on a CPU that takes longer than short runs do.
    """
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):  # torchao's: each other number would be compiled anew
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
    on_cpu = optimizer.param_groups[0]["params"][0].device.type == "cpu"
    with torch.compiler.set_stance("force_eager") if on_cpu and is_8bit(optimizer) else nullcontext():
        optimizer.step()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state by parameter name: ``<name>|exp_avg`` and so on; plain tensors, sharded as the parameters are.

    Keyed by name, never by number: with other layers trainable, numbers would put one layer's moments
    on another of equal shape. A moment in 8 bits is ``<name>|exp_avg|codes`` and ``<name>|exp_avg|scale``; what the
    codes mean is there once, ``table|exp_avg``.
    """
    eight_bit = is_8bit(optimizer)
    tensors = {f"table|{key}": quantization_map(key) for key in MOMENTS} if eight_bit else {}
    for name, parameter in named_parameters(optimizer):
        for key, value in optimizer.state[parameter].items():
            tensors |= _stored(f"{name}|{key}", parameter, value, eight_bit)
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, reader: TensorReader) -> None:
    """Inverse of ``optimizer_tensors``: state from files; of sharded parameters this rank's rows. fp32 moments are
    rounded for an optimizer that has 8 bits, and 8-bit ones decoded for one that has fp32.

    Raises: KeyError when a parameter has no state in the files, or they hold state of another parameter: never a
        fresh Adam in silence. CheckpointError for 8-bit codes of another meaning.
    """
    eight_bit, left = is_8bit(optimizer), reader.names()
    tables = {key: reader.read(f"table|{key}") for key in MOMENTS if f"table|{key}" in left}
    if eight_bit != bool(tables):
        how = "rounded to 8 bits" if eight_bit else "in fp32, as 8 bits had rounded them"
        log.info(f"AdamW's moments go on {how}")
    elif any(not torch.equal(table, quantization_map(key)) for key, table in tables.items()):
        raise CheckpointError(f"{reader.where}: its 8-bit optimizer state means other numbers in this torchao")
    left -= {f"table|{key}" for key in tables}
    for name, parameter in named_parameters(optimizer):
        state = optimizer.state[parameter] if eight_bit else _fp32_state(parameter)
        for key, value in state.items():
            left -= _load(reader, f"{name}|{key}", parameter, value, eight_bit, tables.get(key))
        optimizer.state[parameter] = state
    if left:
        raise KeyError(f"optimizer state of unknown parameters: {sorted(left)[0]}")


def named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def _fp32_state(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    # Fused AdamW keeps its step count on the parameter's device.
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
    return state | {key: torch.zeros_like(parameter, dtype=torch.float32) for key in MOMENTS}


def _stored(place: str, parameter: torch.Tensor, value: torch.Tensor, eight_bit: bool) -> dict[str, torch.Tensor]:
    """One entry of the state as a checkpoint names it; the tensors share its memory."""
    if not (eight_bit and value.ndim and block_size(parameter.shape)):
        return {place: value}
    return {f"{place}|{part}": tensor for part, tensor in tensors_of_8bit_moment(parameter, value).items()}


def _load(
    reader: TensorReader,
    place: str,
    parameter: torch.Tensor,
    value: torch.Tensor,
    eight_bit: bool,
    table: torch.Tensor | None,
) -> set[str]:
    """Fill one entry of the state from the form that the files have it in; returns the names that were read.

    Args:
        eight_bit: the state is an optimizer's that has 8-bit moments.
        table: what the codes in the files mean; None where they hold fp32.
    """
    has_blocks = value.ndim > 0 and block_size(parameter.shape) is not None
    if not has_blocks or eight_bit == (table is not None):
        parts = _stored(place, parameter, value, eight_bit)
    elif eight_bit:
        parts = {place: torch.zeros_like(parameter.detach())}
    else:
        parts = {f"{place}|{part}": tensor for part, tensor in empty_tensors_of_8bit_moment(parameter).items()}
    for name, tensor in parts.items():
        reader.copy_into(name, tensor)
    if has_blocks and eight_bit and table is None:
        quantize(*parts.values(), value)
    elif has_blocks and table is not None and not eight_bit:
        dequantize(*parts.values(), table, value)
    return set(parts)
