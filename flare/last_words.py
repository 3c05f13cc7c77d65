"""What a rank that ran out of memory says: the plan's numbers, and flags that need less. No torch."""

from flare.plan import Plan
from flare.rooms import in_gib
from flare.suggest import suggest

NEEDS_LESS = 0.8
"""Of the planned peak: what a proposal after running out of memory may need. The plan was too low by some part."""


ELSEWHERE = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What errors say whose memory was not asked for by torch's allocator: NCCL's buffers, cuBLAS's, CUDA's own."""


def ran_out_of_memory(error: Exception) -> bool:
    """Whether a RuntimeError of torch's means that a card's memory is full."""
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in ELSEWHERE)


def out_of_memory(plan: Plan, rank: int, device: str, error: Exception) -> str:
    """What a rank ran out of, what the plan had said, and flags that need clearly less, the batch unchanged."""
    need = plan.memory.peak_bytes
    reason = str(error).split(". GPU")[0].split("\n")[0].strip().rstrip(".")
    return (
        f"rank {rank} ({device}) ran out of memory ({reason}); the plan is {in_gib(need)} at "
        f"the peak ({plan.memory.peak_phase}); nothing is lost but the steps since the last checkpoint; "
        f"{suggest(plan.inputs, int(NEEDS_LESS * need))}"
    )
