"""Memory that a run may use on its GPUs or on the CPU, and the text form of sizes. No torch."""

from collections import Counter
from dataclasses import dataclass

from flare.plan.inputs import PlanInputs

MIB, GIB = 2**20, 2**30

RESERVE_FRACTION, RESERVE_BYTES = 0.06, int(0.7 * GIB)
"""Memory that stays free: a fraction because the allocator fragments, and bytes for the CUDA context and the
workspaces of libraries. An estimate, not measured on a GPU. On the CPU: Python and torch."""


@dataclass(frozen=True)
class Capacity:
    """Memory that one process may use, on GPUs of one kind or on the CPU."""

    label: str
    total_bytes: int
    usable_bytes: int


def usable_bytes(total_bytes: int) -> int:
    """Bytes that a run may use of the memory of a GPU, or of a CPU process."""
    return max(0, int(total_bytes * (1 - RESERVE_FRACTION)) - RESERVE_BYTES)


def capacities(inputs: PlanInputs) -> tuple[Capacity, ...]:
    """One capacity for each kind of GPU whose memory size is known, or one for the CPU."""
    if inputs.gpus:
        kinds = Counter(inputs.gpus).items()
        known = [(f"{n} x {name}", mib * MIB) for (name, mib), n in kinds if mib is not None]
        return tuple(Capacity(label, total, usable_bytes(total)) for label, total in known)
    if inputs.available_ram_bytes is None:
        return ()
    processes = inputs.processes_per_host or inputs.world_size
    share = inputs.available_ram_bytes // processes
    return (Capacity(f"CPU, {format_processes(processes)}", share, usable_bytes(share)),)


def format_processes(count: int) -> str:
    return f"{count} process{'' if count == 1 else 'es'}"


def in_gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"
