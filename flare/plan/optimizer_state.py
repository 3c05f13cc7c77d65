"""Bytes of AdamW's state (two moments), and which tensors ``--optim adamw_torch_8bit`` stores in 8 bits.

Used by the optimizer and by the plan. No torch.
"""

import math

EIGHT_BIT = "adamw_torch_8bit"
"""transformers' name for torchao's AdamW; its ``adamw_8bit`` is bitsandbytes'."""

BLOCKS = (256, 128)
"""Elements that share a scale, the preferred size first. Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization
(2022), with torchao's 256; 128 also divides the rows of Qwen2.5-0.5B (896)."""

SMALLEST = 4096
"""Elements of a tensor below which its moments stay in fp32, as in bitsandbytes and torchao."""

DEQUANTIZATION_TABLE_BYTES = 256 * 4
"""The lookup table from 8 bits to fp32 that is stored with every 8-bit moment: 256 numbers."""

ADAM_STATE_BYTES = 2 * 4
"""Both moments in fp32, per trainable parameter."""

COMPILED_UPDATE_BYTES, EAGER_UPDATE_BYTES = 8, 53
"""Temporary bytes of an 8-bit update, per element of the largest tensor: compiled, where both moments exist in fp32 for
a short time (counted on the CPU), and not compiled, as on a CPU."""


def block_size(shape: tuple[int, ...]) -> int | None:
    """Elements of a parameter's 8-bit moments that share a scale; None when its moments stay in fp32.

    A block is part of one row. FSDP divides a matrix by rows, so it never divides a block: any number of ranks can
    read a state that another number wrote, bit for bit. (torchao divides each rank's elements into blocks.)
    """
    if len(shape) < 2 or math.prod(shape) < SMALLEST:
        return None
    return next((block for block in BLOCKS if math.prod(shape[1:]) % block == 0), None)


def parameter_state_bytes(shape: tuple[int, ...], optimizer: str, shards: int = 1) -> int:
    """Bytes of both moments of one parameter, on one of ``shards`` ranks."""
    elements, block = math.prod(shape), block_size(shape) if optimizer == EIGHT_BIT else None
    if block is None:
        return ADAM_STATE_BYTES * elements // shards
    return 2 * ((elements + 4 * elements // block) // shards + DEQUANTIZATION_TABLE_BYTES)
