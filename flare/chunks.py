"""How many rows of logits exist at a time. No torch: the plan counts by it, the loss goes by it."""

from flare.shapes import FP32_BYTES

CPU_CHUNK_BYTES = 160_000_000
CUDA_CHUNK_BYTES = 640_000_000
"""fp32 logits of a chunk: 256 rows of Qwen's vocabulary on a CPU, 1024 on a card.

Each chunk adds to the head's whole weight gradient. On a card, reading and writing that for 256 rows takes
longer than their matmuls (an estimate from the H100's bandwidth and rate, not measured yet); a CPU gains
nothing from larger chunks (docs/experiments.md)."""

ROUND_TO_ROWS = 128


def loss_chunk_rows(vocab_size: int, on_card: bool) -> int:
    """Rows whose logits the loss holds at the same time."""
    limit = CUDA_CHUNK_BYTES if on_card else CPU_CHUNK_BYTES
    return max(limit // (FP32_BYTES * vocab_size) // ROUND_TO_ROWS, 1) * ROUND_TO_ROWS
