"""Memory that torch's CPU allocator holds while a function runs, from the profiler. For tests and benchmarks."""

import itertools
from collections.abc import Callable

import torch
from torch._C._profiler import _EventType


def allocated(step: Callable[[], None]) -> list[int]:
    """Bytes held in addition to those before the call, after each change while ``step`` runs. Begins with 0."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        step()
    sizes: list[tuple[int, int]] = []
    waiting = list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [0, *itertools.accumulate(size for _, size in sorted(sizes, key=lambda item: item[0]))]


def allocated_peak(step: Callable[[], None]) -> int:
    """The largest number of bytes held."""
    return max(allocated(step))
