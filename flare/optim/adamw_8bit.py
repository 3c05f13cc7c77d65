"""``--optim adamw_torch_8bit``: torchao's 8-bit AdamW, with quantization blocks inside rows.

torchao defines the number format and the update. ``flare.plan.optimizer_state`` decides which moments are in 8 bits
and the block size. The moments are created here, before torchao would create them with its own block size, and are
saved as plain tensors.
"""

import torch
from torch.distributed.tensor import DTensor

from flare.distributed.fsdp import is_sharded, local_tensor
from flare.plan.optimizer_state import block_size

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""AdamW's moments, and whether each is signed: signed and unsigned moments have different quantization maps."""


def build_adamw_8bit(groups: list[dict], **settings: object) -> torch.optim.Optimizer:
    """torchao's optimizer for these parameter groups, with its state initialized."""
    from torchao.optim import AdamW8bit

    optimizer = AdamW8bit(groups, **settings)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {key: _zeros(parameter, signed) for key, signed in MOMENTS.items()}
            # Always on the CPU: the kernel reads the step as a number.
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def _zeros(parameter: torch.Tensor, signed: bool) -> torch.Tensor:
    """A zero moment for this parameter, sharded as the parameter is."""
    from torchao.optim.subclass_8bit import OptimState8bit

    block, local = block_size(parameter.shape), local_tensor(parameter.detach())
    if block is None or local.numel() == 0:  # with more ranks than rows, a rank may have no row
        return torch.zeros_like(parameter.detach())
    moment = OptimState8bit.zeros(local.shape, signed, block, local.device, local.dtype)
    return _sharded_like(parameter, moment, parameter.shape) if is_sharded(parameter) else moment


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer is torchao's 8-bit AdamW."""
    return type(optimizer).__module__.startswith("torchao.")


def tensors_of_8bit_moment(parameter: torch.Tensor, moment: torch.Tensor) -> dict[str, torch.Tensor]:
    """An 8-bit moment of a parameter (R, ...) as plain tensors that share its memory, sharded as the parameter is.

    ``codes`` (R, ...) uint8 and ``scale`` (R, blocks per row) fp32. An element is map[code] x scale of its block.
    """
    local = local_tensor(moment)
    if not local.numel():
        return empty_tensors_of_8bit_moment(parameter)
    return _codes_and_scale(parameter, local.codes, local.scale)


def empty_tensors_of_8bit_moment(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Zero tensors with the shapes of ``tensors_of_8bit_moment``, for a checkpoint to be read into."""
    local = local_tensor(parameter.detach())
    codes = torch.zeros_like(local, dtype=torch.uint8)
    return _codes_and_scale(parameter, codes, local.new_zeros(local.numel() // block_size(parameter.shape)))


def _codes_and_scale(parameter: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    shape = parameter.shape
    blocks = shape[1:].numel() // block_size(shape)
    scale = scale.view(codes.shape[0], blocks)
    if not is_sharded(parameter):
        return {"codes": codes, "scale": scale}
    scale_shape = torch.Size((shape[0], blocks))
    return {
        "codes": _sharded_like(parameter, codes, shape),
        "scale": _sharded_like(parameter, scale, scale_shape),
    }


def quantization_map(key: str) -> torch.Tensor:
    """The values of the 256 codes of this moment: fp32, ascending."""
    from torchao.optim import subclass_8bit

    return torch.tensor(subclass_8bit.get_qmap_signed() if MOMENTS[key] else subclass_8bit.get_qmap_unsigned())


def dequantize(codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, moment: torch.Tensor) -> None:
    """Write the values of an 8-bit moment into an fp32 moment. Does not need torchao."""
    codes, scale, target = local_tensor(codes), local_tensor(scale), local_tensor(moment)
    values = table.to(target.device)[codes.int()].view(*scale.shape, -1) * scale.unsqueeze(-1)
    target.copy_(values.view_as(target))


def quantize(values: torch.Tensor, moment: torch.Tensor) -> None:
    """Round fp32 values into an 8-bit moment."""
    local_tensor(moment).copy_(local_tensor(values))


def _sharded_like(parameter: DTensor, local: torch.Tensor, shape: torch.Size) -> DTensor:
    """A sharded tensor of this shape from this rank's rows, with the placement of the parameter."""
    mesh, placements = parameter.device_mesh, parameter.placements
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
