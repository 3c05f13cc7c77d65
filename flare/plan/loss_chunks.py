"""Chunk sizes of the loss: how many rows of logits exist at a time. Used by the loss and by the plan. No torch."""

from flare.plan.model_shape import FP32_BYTES

CPU_CHUNK_BYTES = 320_000_000
CUDA_CHUNK_BYTES = 640_000_000
"""fp32 logits of a chunk: 512 rows of Qwen's vocabulary on a CPU, 1024 on a GPU.

Each chunk reads and writes the complete weight gradient of the head. On a GPU, that takes longer than the matmuls of
256 rows (an estimate from the H100's bandwidth and FLOP rate, not measured). On a CPU, chunks of 256 rows are as fast
as chunks of 512 in fp32, and take 1.25 times as long in bf16 (docs/experiments.md)."""

CPU_BLOCK_ROWS = 8192
"""Rows of the head whose bf16 weight gradient a CPU computes at a time and adds to the fp32 sum."""

CPU_SOFTMAX_BYTES, LEAST_SOFTMAX_ROWS = 2**20, 32
"""fp32 logits whose gradient a CPU computes at a time: few enough for its cache, and enough that calling torch
does not take longer than the computation (docs/experiments.md)."""

ROUND_TO_ROWS = 128


def loss_chunk_rows(vocab_size: int, on_gpu: bool) -> int:
    """Rows of logits in one chunk of the loss."""
    limit = CUDA_CHUNK_BYTES if on_gpu else CPU_CHUNK_BYTES
    return max(limit // (FP32_BYTES * vocab_size) // ROUND_TO_ROWS, 1) * ROUND_TO_ROWS


def cpu_softmax_rows(vocab_size: int) -> int:
    """Rows of logits whose gradient a CPU computes at a time."""
    return max(CPU_SOFTMAX_BYTES // (FP32_BYTES * vocab_size), LEAST_SOFTMAX_ROWS)
