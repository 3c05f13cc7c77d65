"""Divides the rows of a step among ranks whose GPUs differ in speed. Pure functions; no torch.

The rows of a step and their order do not depend on the balance, so the gradients do not either: only the rank that
computes a row changes. ``flare.train.rank_speed`` measures the speed of each rank.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from flare.errors import ConfigError
from flare.gpus.specs import peak_tflops

WORDS = ("auto", "measure", "equal")

REUSED_SUFFIX = ", as before"
"""Ends the reason of a balance that a resumed run reuses."""

EQUAL_SPEED_RATIO = 1.05
"""Speeds within this factor count as equal, because the speed of one GPU varies by about as much from minute to
minute. A guess, not measured on GPUs."""

MIN_SPEEDUP_TO_EXCLUDE = 1.02
"""The plan proposes to leave GPUs out when a step gets faster by at least this factor. A guess: estimates from peak
rates are not exact enough to decide about less."""


@dataclass(frozen=True)
class Balance:
    """Rows of a step for each rank, and the reason for them.

    ``gpus`` and ``seconds_per_row`` have one entry a rank; they are empty when nothing was measured. A resumed run on
    the same GPUs reuses them instead of measuring again.
    """

    rows: tuple[int, ...]
    reason: str
    gpus: tuple[str, ...] = ()
    seconds_per_row: tuple[float, ...] = ()

    def as_dict(self) -> dict:
        """For trainer_state.json."""
        return {
            "rows": list(self.rows),
            "reason": self.reason,
            "gpus": list(self.gpus),
            "seconds_per_row": list(self.seconds_per_row),
        }


def parse_weights(value: str, world_size: int) -> list[float] | None:
    """Parse the weights of ``--balance W,W,...``. Returns None for auto, measure and equal.

    Raises: ConfigError when the value cannot be parsed, or does not have one weight for each process.
    """
    if value in WORDS:
        return None
    try:
        weights = [float(word) for word in value.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"--balance must be auto, measure, equal, or numbers above 0 like 3,1; got {value!r}")
    if len(weights) != world_size:
        raise ConfigError(
            f"--balance {value} has {len(weights)} weights for {world_size} processes; give one for each"
        )
    return weights


def equal_balance(num_rows: int, world_size: int, reason: str = "equal") -> Balance:
    """The same number of rows for each rank; the first ranks get one more when the division has a remainder."""
    return Balance(tuple(allocate_rows(num_rows, [1.0] * world_size)), reason)


def balance_by_weights(num_rows: int, weights: list[float]) -> Balance:
    """Rows in proportion to the weights of ``--balance W,W,...``."""
    reason = f"--balance {','.join(f'{weight:g}' for weight in weights)}"
    return Balance(tuple(allocate_rows(num_rows, weights)), reason)


def balance_by_speed(num_rows: int, gpus: Sequence[str], seconds_per_row: Sequence[float]) -> Balance:
    """Rows by measured seconds per row; equal rows when the speeds are within ``EQUAL_SPEED_RATIO``."""
    alike = max(seconds_per_row) <= EQUAL_SPEED_RATIO * min(seconds_per_row)
    rows = allocate_rows(num_rows, [1.0] * len(gpus) if alike else [1 / seconds for seconds in seconds_per_row])
    reason = "equal: measured speeds are alike" if alike else "by measured speed"
    return Balance(tuple(rows), reason, tuple(gpus), tuple(seconds_per_row))


def balance_from_checkpoint(record: dict | None, num_rows: int, gpus: Sequence[str]) -> Balance | None:
    """The balance of a checkpoint's ``trainer_state.json``, if it was measured on the same GPUs for as many rows."""
    if not record or not record["seconds_per_row"] or sum(record["rows"]) != num_rows:
        return None
    if record.get("gpus", record.get("cards")) != list(gpus):  # the older name of the key
        return None
    rows, seconds = tuple(record["rows"]), tuple(record["seconds_per_row"])
    return Balance(rows, f"{record['reason'].removesuffix(REUSED_SUFFIX)}{REUSED_SUFFIX}", tuple(gpus), seconds)


def step_time(rows: Sequence[int], speeds: Sequence[float]) -> float:
    """Time of a step, in units of one row at speed 1. All ranks wait for the slowest."""
    return max(count / speed for count, speed in zip(rows, speeds, strict=True))


def speedup_over_equal(num_rows: int, speeds: Sequence[float]) -> float:
    """How many times faster a step is with rows by speed than with equal rows, without reduction and update."""
    by_rate = allocate_rows(num_rows, list(speeds))
    even = allocate_rows(num_rows, [1.0] * len(speeds))
    return step_time(even, speeds) / step_time(by_rate, speeds)


def fastest_subset(num_rows: int, speeds: Sequence[float]) -> tuple[int, float]:
    """Return how many of the fastest ranks to keep, and how many times faster a step is than with all ranks.

    Each rank gets at least one row, so one very slow GPU can make every step slow. All ranks are kept unless fewer
    are faster by ``MIN_SPEEDUP_TO_EXCLUDE``.
    """
    fastest = sorted(speeds, reverse=True)
    with_all = step_time(allocate_rows(num_rows, fastest), fastest)
    keep, best = len(fastest), 1.0
    for count in range(len(fastest) - 1, 0, -1):
        if fastest[count] == fastest[count - 1]:  # GPUs of one kind stay together
            continue
        faster = with_all / step_time(allocate_rows(num_rows, fastest[:count]), fastest[:count])
        if faster >= MIN_SPEEDUP_TO_EXCLUDE * best:
            keep, best = count, faster
    return keep, best


def balance_summary(option: str, num_rows: int, names: Sequence[str]) -> str:
    """The plan's sentence about different GPUs; '' when all GPUs are of one kind.

    The numbers are estimates from peak rates. The real speeds are measured at the start of training.
    """
    if len(set(names)) < 2:
        return ""
    weights = parse_weights(option, len(names))
    if weights:
        return f"rows by hand: {format_rows(names, allocate_rows(num_rows, weights))}"
    speeds = [peak_tflops(name) for name in names]
    if None in speeds:
        unknown = next(name for name, speed in zip(names, speeds, strict=True) if speed is None)
        begin = "unlike GPUs, equal rows" if option == "equal" else "rows by speed, measured at the start"
        return f"{begin}; no estimate, because the rate of {unknown} is not known"
    gain = speedup_over_equal(num_rows, speeds)
    likely = format_rows(names, allocate_rows(num_rows, speeds))
    if option == "equal":
        text = f"equal rows on unlike GPUs; by speed a step would be about {gain:.2f}x faster (--balance auto)"
    else:
        text = f"rows by speed, measured at the start; by peak rates {likely}, about {gain:.2f}x equal shares"
    keep, faster = fastest_subset(num_rows, speeds)
    if keep < len(names):
        slowest_kept = sorted(speeds, reverse=True)[keep - 1]
        slow = sorted({name for name, speed in zip(names, speeds, strict=True) if speed < slowest_kept})
        text += f"; leaving out {' and '.join(slow)} would be about {faster:.2f}x faster still"
    return text


def format_rows(names: Sequence[str], rows: Sequence[int]) -> str:
    """ "3 rows for A800, 1 for A40": neighbours with the same name and rows are grouped."""
    groups: list[list] = []
    for name, count in zip(names, rows, strict=True):
        if groups and groups[-1][:2] == [name, count]:
            groups[-1][2] += 1
        else:
            groups.append([name, count, 1])
    words = [f"{count} for {f'each of {n} x ' if n > 1 else ''}{name}" for name, count, n in groups]
    return ", ".join(words)


def allocate_rows(num_rows: int, weights: list[float]) -> list[int]:
    """Divide ``num_rows`` rows among ranks so that the last rank finishes as early as possible. Each rank gets a row.

    ``weights`` are speeds: n rows take a rank n / weight. Each next row goes to the rank that would finish it first
    (D'Hondt's rule), which gives the least possible maximum. Where proportional shares are integers, they are the
    result.

    Raises: ValueError for fewer rows than ranks.
    """
    if num_rows < len(weights):
        raise ValueError(f"{num_rows} rows cannot be shared among {len(weights)} ranks")
    counts = [1] * len(weights)
    queue = [(2 / weight, rank) for rank, weight in enumerate(weights)]
    heapq.heapify(queue)
    for _ in range(num_rows - len(weights)):
        _, rank = queue[0]
        counts[rank] += 1
        heapq.heapreplace(queue, ((counts[rank] + 1) / weights[rank], rank))
    return counts
