"""The optimizer: parameter groups, the update, and its state in checkpoints."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch

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
    """Two parameter groups: matrices and embeddings with weight decay, norms and biases (vectors) without."""
    decay: dict = {"params": [], "names": [], "weight_decay": weight_decay}
    no_decay: dict = {"params": [], "names": [], "weight_decay": 0.0}
    for name, parameter in named:
        group = decay if parameter.ndim >= 2 else no_decay
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in (decay, no_decay) if group["params"]]


def build_optimizer(named: Iterable[tuple[str, torch.nn.Parameter]], options: Options) -> torch.optim.Optimizer:
    """AdamW for the trainable parameters. Each parameter group also has the ``names`` of its parameters."""
    groups = parameter_groups(named, options.weight_decay)
    settings = {"lr": options.learning_rate, "betas": (options.adam_beta1, options.adam_beta2)}
    settings["eps"] = options.adam_epsilon
    if options.optim == EIGHT_BIT:
        return build_adamw_8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=options.optim == "adamw_torch_fused", **settings)


def can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer reads ``found_inf``, a flag on the device that skips the update. Fused kernels do."""
    return bool(optimizer.defaults.get("fused"))


def optimizer_step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Update the parameters with this learning rate.

    torchao compiles its update once for each parameter shape. On a CPU it runs without compilation, which would take
    longer than a short run.
    """
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):  # torchao: a Python number would be compiled again whenever it changes
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
    on_cpu = optimizer.param_groups[0]["params"][0].device.type == "cpu"
    with torch.compiler.set_stance("force_eager") if on_cpu and is_8bit(optimizer) else nullcontext():
        optimizer.step()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state as plain tensors by name (``<name>|exp_avg``, ...), sharded as the parameters are.

    Keys are names, not positions: when other layers train, positions would assign the moments of one layer to another
    layer of the same shape. An 8-bit moment is stored as ``<name>|exp_avg|codes`` and ``<name>|exp_avg|scale``; the
    quantization map is stored once, as ``table|exp_avg``.
    """
    eight_bit = is_8bit(optimizer)
    tensors = {f"table|{key}": quantization_map(key) for key in MOMENTS} if eight_bit else {}
    for name, parameter in named_parameters(optimizer):
        for key, value in optimizer.state[parameter].items():
            tensors |= _checkpoint_tensors(f"{name}|{key}", parameter, value, eight_bit)
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, reader: TensorReader) -> None:
    """Load the state that ``optimizer_tensors`` has stored; of sharded parameters only this rank's rows.

    fp32 moments are quantized for an 8-bit optimizer, and 8-bit moments are dequantized for an fp32 optimizer.

    Raises: KeyError when the state of a parameter is missing, or the files hold the state of an unknown parameter: the
        moments are never reset silently. CheckpointError when the files use another quantization map.
    """
    eight_bit, left = is_8bit(optimizer), reader.names()
    tables = {key: reader.read(f"table|{key}") for key in MOMENTS if f"table|{key}" in left}
    if eight_bit != bool(tables):
        how = "rounded to 8 bits" if eight_bit else "converted to fp32 from 8 bits"
        log.info(f"AdamW's moments are {how}")
    elif any(not torch.equal(table, quantization_map(key)) for key, table in tables.items()):
        raise CheckpointError(
            f"{reader.directory}: its 8-bit optimizer state has another quantization map than this torchao"
        )
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
    # Fused AdamW has its step count on the device of the parameter.
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
    return state | {key: torch.zeros_like(parameter, dtype=torch.float32) for key in MOMENTS}


def _checkpoint_tensors(
    name: str, parameter: torch.Tensor, value: torch.Tensor, eight_bit: bool
) -> dict[str, torch.Tensor]:
    """The tensors of one state entry, by their names in a checkpoint. They share the memory of the entry."""
    if not (eight_bit and value.ndim and block_size(parameter.shape)):
        return {name: value}
    return {f"{name}|{part}": tensor for part, tensor in tensors_of_8bit_moment(parameter, value).items()}


def _load(
    reader: TensorReader,
    entry: str,
    parameter: torch.Tensor,
    value: torch.Tensor,
    eight_bit: bool,
    table: torch.Tensor | None,
) -> set[str]:
    """Load one state entry, and convert it if the files have another format. Returns the names that were read.

    Args:
        entry: name of the entry, ``<name>|exp_avg``.
        eight_bit: whether the optimizer has 8-bit moments.
        table: quantization map of the moment in the files; None when it is in fp32.
    """
    has_blocks = value.ndim > 0 and block_size(parameter.shape) is not None
    if not has_blocks or eight_bit == (table is not None):
        parts = _checkpoint_tensors(entry, parameter, value, eight_bit)
    elif eight_bit:
        parts = {entry: torch.zeros_like(parameter.detach())}
    else:
        parts = {f"{entry}|{part}": tensor for part, tensor in empty_tensors_of_8bit_moment(parameter).items()}
    for name, tensor in parts.items():
        reader.copy_into(name, tensor)
    if has_blocks and eight_bit and table is None:
        quantize(*parts.values(), value)
    elif has_blocks and table is not None and not eight_bit:
        dequantize(*parts.values(), table, value)
    return set(parts)
