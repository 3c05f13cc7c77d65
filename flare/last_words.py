"""What a rank that ran out of memory says: the plan's numbers, and flags that need less. No torch."""

from flare.errors import first_line
from flare.phase import while_phase
from flare.plan import Plan
from flare.rooms import in_gib
from flare.suggest import suggest

NEEDS_LESS = 0.8
"""Of the planned peak: what a proposal after running out of memory may need. The plan was too low by some part."""


def out_of_memory(plan: Plan, rank: int, device: str, error: Exception) -> str:
    """What a rank ran out of, what the plan had said, and flags that need clearly less, the batch unchanged."""
    need = plan.memory.peak_bytes
    reason = first_line(error.__cause__ or error).split(". GPU")[0].rstrip(".")
    return (
        f"rank {rank} ({device}) ran out of memory{while_phase()} ({reason}); the plan is {in_gib(need)} at "
        f"the peak ({plan.memory.peak_phase}); nothing is lost but the steps since the last checkpoint; "
        f"{suggest(plan.inputs, int(NEEDS_LESS * need))}"
    )
