"""AdamW's two moments: which of them ``--optim adamw_torch_8bit`` holds in 8 bits, and the bytes of them.

No torch: the plan counts by it, the optimizer goes by it.
"""

import math

EIGHT_BIT = "adamw_torch_8bit"
"""transformers' name for torchao's AdamW; its ``adamw_8bit`` is bitsandbytes'."""

BLOCKS = (256, 128)
"""Elements that share a scale, the best first. Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization
(2022), with torchao's 256; 128 divides the rows of Qwen2.5-0.5B (896), too."""

SMALLEST = 4096
"""Elements of a tensor below which its moments stay in fp32, as in bitsandbytes and torchao."""

DEQUANTIZATION_TABLE_BYTES = 256 * 4
"""What the 8 bits mean: 256 fp32 numbers beside every 8-bit moment."""

ADAM_STATE_BYTES = 2 * 4
"""Both moments in fp32, per trainable parameter."""

COMPILED_UPDATE_BYTES, EAGER_UPDATE_BYTES = 8, 53
"""An update from 8-bit moments, per element of the largest tensor: both moments in fp32 for a moment, as torch's
compiler makes it (counted on the CPU); and as it is written, which is how it runs on a CPU."""


def block_size(shape: tuple[int, ...]) -> int | None:
    """Elements of a parameter's 8-bit moments that share a scale; None: its moments stay in fp32.

    A block lies within a row. So wherever ranks cut a matrix, by rows, they cut no block, and a state written by any
    number of them is read by any other to the same bits. (torchao cuts a rank's elements into blocks as they come.)
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
