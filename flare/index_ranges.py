"""Lists of indices as text: ``0-3,5``. GPUs and layers are printed this way. Standard library only."""

from collections.abc import Iterable


def format_ranges(indices: Iterable[int], separator: str = ",") -> str:
    """ "0-3,5" for 0, 1, 2, 3 and 5, in any order and with duplicates; "" for no indices."""
    ranges: list[list[int]] = []
    for index in sorted(set(indices)):
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return separator.join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
