"""How many rows of logits exist at a time. No torch: the plan counts by it, the loss goes by it."""

from flare.plan.model_shape import FP32_BYTES

CPU_CHUNK_BYTES = 320_000_000
CUDA_CHUNK_BYTES = 640_000_000
"""fp32 logits of a chunk: 512 rows of Qwen's vocabulary on a CPU, 1024 on a GPU.

Each chunk adds to the head's whole weight gradient. On a GPU, reading and writing that for 256 rows takes
longer than their matmuls (an estimate from the H100's bandwidth and rate, not measured yet); on a CPU 256 rows
take as long as 512 in fp32, and 1.25 times as long in bf16 (docs/experiments.md)."""

CPU_BLOCK_ROWS = 8192
"""Rows of the head whose bf16 weight gradient a CPU makes at a time, to add it to the fp32 sum."""

CPU_SOFTMAX_BYTES, LEAST_SOFTMAX_ROWS = 2**20, 32
"""fp32 logits that a CPU makes the gradient of at a time: they stay in its cache, and are not so few that calling
torch takes longer than to compute (docs/experiments.md)."""

ROUND_TO_ROWS = 128


def loss_chunk_rows(vocab_size: int, on_gpu: bool) -> int:
    """Rows whose logits the loss holds at the same time."""
    limit = CUDA_CHUNK_BYTES if on_gpu else CPU_CHUNK_BYTES
    return max(limit // (FP32_BYTES * vocab_size) // ROUND_TO_ROWS, 1) * ROUND_TO_ROWS


def cpu_softmax_rows(vocab_size: int) -> int:
    """Rows of logits that a CPU makes the gradient of at a time."""
    return max(CPU_SOFTMAX_BYTES // (FP32_BYTES * vocab_size), LEAST_SOFTMAX_ROWS)
