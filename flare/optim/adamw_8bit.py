"""``--optim adamw_torch_8bit``: torchao's AdamW, with blocks that lie within rows, and its moments as plain tensors.

torchao brings the number format and the update. Which moments are in 8 bits, and in blocks of how many elements, is
said by ``flare.plan.optimizer_state``: they are made here, before torchao would make them in its own way.
"""

import torch
from torch.distributed.tensor import DTensor

from flare.distributed.fsdp import is_sharded, local_tensor
from flare.plan.optimizer_state import block_size

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Names of AdamW's moments, and whether they may be negative: the 8-bit codes of each have a table of their own."""


def build_adamw_8bit(groups: list[dict], **settings: object) -> torch.optim.Optimizer:
    """torchao's optimizer over these groups, its state ready."""
    from torchao.optim import AdamW8bit

    optimizer = AdamW8bit(groups, **settings)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {key: _zeros(parameter, signed) for key, signed in MOMENTS.items()}
            # On the CPU, whatever the parameter is on: a kernel takes it as a number.
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def _zeros(parameter: torch.Tensor, signed: bool) -> torch.Tensor:
    """A moment of this parameter, sharded as it is."""
    from torchao.optim.subclass_8bit import OptimState8bit

    block, local = block_size(parameter.shape), local_tensor(parameter.detach())
    if block is None or local.numel() == 0:  # more ranks than rows: this one has none
        return torch.zeros_like(parameter.detach())
    moment = OptimState8bit.zeros(local.shape, signed, block, local.device, local.dtype)
    return _sharded_like(parameter, moment, parameter.shape) if is_sharded(parameter) else moment


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is the one that is built here."""
    return type(optimizer).__module__.startswith("torchao.")


def tensors_of_8bit_moment(parameter: torch.Tensor, moment: torch.Tensor) -> dict[str, torch.Tensor]:
    """An 8-bit moment of a parameter (R, ...) as plain tensors that share its memory, rows sharded as the parameter's.

    ``codes`` (R, ...) uint8 and ``scale`` (R, blocks of a row) fp32: an element is table[code] x scale of its block.
    """
    local = local_tensor(moment)
    if not local.numel():
        return empty_tensors_of_8bit_moment(parameter)
    return _sharded_parts(parameter, local.codes, local.scale)


def empty_tensors_of_8bit_moment(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Room for the parts of a moment of this parameter."""
    local = local_tensor(parameter.detach())
    codes = torch.zeros_like(local, dtype=torch.uint8)
    return _sharded_parts(parameter, codes, local.new_zeros(local.numel() // block_size(parameter.shape)))


def _sharded_parts(parameter: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
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
    """What the 256 codes of this moment mean: fp32, ascending."""
    from torchao.optim import subclass_8bit

    return torch.tensor(subclass_8bit.get_qmap_signed() if MOMENTS[key] else subclass_8bit.get_qmap_unsigned())


def dequantize(codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, moment: torch.Tensor) -> None:
    """Write the numbers that an 8-bit moment's parts stand for into an fp32 moment. Needs no torchao."""
    codes, scale, target = local_tensor(codes), local_tensor(scale), local_tensor(moment)
    numbers = table.to(target.device)[codes.int()].view(*scale.shape, -1) * scale.unsqueeze(-1)
    target.copy_(numbers.view_as(target))


def quantize(numbers: torch.Tensor, moment: torch.Tensor) -> None:
    """Round an fp32 moment into an 8-bit one."""
    local_tensor(moment).copy_(local_tensor(numbers))


def _sharded_like(parameter: DTensor, local: torch.Tensor, shape: torch.Size) -> DTensor:
    """This rank's rows of a tensor of that shape, rows divided as the parameter's are."""
    mesh, placements = parameter.device_mesh, parameter.placements
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
