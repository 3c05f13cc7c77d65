"""Who gets how many rows of a step, where the GPUs are not alike. Pure functions; no torch.

The rows of a step, their order, and so the gradients are the same whatever is decided here: only who works on
which rows changes. What a rank's speed is, ``flare.train.rank_speed`` measures.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from flare.errors import ConfigError
from flare.gpus.specs import peak_tflops

WORDS = ("auto", "measure", "equal")

AS_BEFORE = ", as before"
"""Ends the reason of a balance that a resumed run took over."""

ALIKE = 1.05
"""Speeds within this factor count as equal: it is what one and the same GPU varies by from minute to minute (a
guess, to be measured on GPUs), and equal shares need no explanation."""

WORTH_LEAVING_OUT = 1.02
"""Leaving GPUs out is proposed when it makes a step faster by at least this factor (a guess: below, the estimate
from peak rates decides nothing)."""


@dataclass(frozen=True)
class Balance:
    """Rows of a step for each rank, and why.

    ``GPUs`` and ``seconds_per_row`` are by rank, as measured (empty when nothing was): a resumed run on the
    same GPUs takes them over instead of measuring again.
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
    """The weights of ``--balance W,W,...``; None for its words.

    Raises: ConfigError for what is neither, or not one weight for each process.
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


def equal(num_rows: int, world_size: int, reason: str = "equal") -> Balance:
    """The same for each rank; the first ones get what is left over."""
    return Balance(tuple(shares(num_rows, [1.0] * world_size)), reason)


def by_hand(num_rows: int, weights: list[float]) -> Balance:
    """Rows by ``--balance W,W,...``."""
    return Balance(tuple(shares(num_rows, weights)), f"--balance {','.join(f'{weight:g}' for weight in weights)}")


def by_speed(num_rows: int, gpus: Sequence[str], seconds_per_row: Sequence[float]) -> Balance:
    """Rows by measured seconds per row; equal ones when these are within ``ALIKE``."""
    alike = max(seconds_per_row) <= ALIKE * min(seconds_per_row)
    rows = shares(num_rows, [1.0] * len(gpus) if alike else [1 / seconds for seconds in seconds_per_row])
    reason = "equal: measured speeds are alike" if alike else "by measured speed"
    return Balance(tuple(rows), reason, tuple(gpus), tuple(seconds_per_row))


def from_record(record: dict | None, num_rows: int, gpus: Sequence[str]) -> Balance | None:
    """The balance of a checkpoint's ``trainer_state.json``, if it was measured on these very GPUs for these rows."""
    if not record or not record["seconds_per_row"] or sum(record["rows"]) != num_rows:
        return None
    if record.get("gpus", record.get("cards")) != list(gpus):  # "cards" in checkpoints of before the packages
        return None
    rows, seconds = tuple(record["rows"]), tuple(record["seconds_per_row"])
    return Balance(rows, f"{record['reason'].removesuffix(AS_BEFORE)}{AS_BEFORE}", tuple(gpus), seconds)


def step_time(rows: Sequence[int], speeds: Sequence[float]) -> float:
    """Time of a step in units of one row at speed 1: all ranks wait for the slowest."""
    return max(count / speed for count, speed in zip(rows, speeds, strict=True))


def gain_over_equal(num_rows: int, speeds: Sequence[float]) -> float:
    """How many times faster a step is with rows by speed than with equal rows; reduction and update left out."""
    by_rate = shares(num_rows, list(speeds))
    even = shares(num_rows, [1.0] * len(speeds))
    return step_time(even, speeds) / step_time(by_rate, speeds)


def fastest_without_slow(num_rows: int, speeds: Sequence[float]) -> tuple[int, float]:
    """(how many of the fastest ranks to keep, how many times faster a step then is than with all of them).

    Each rank gets at least one row, so a very slow GPU can hold up a step all by itself. All are kept unless fewer
    are faster by ``WORTH_LEAVING_OUT``.
    """
    fastest = sorted(speeds, reverse=True)
    with_all = step_time(shares(num_rows, fastest), fastest)
    keep, best = len(fastest), 1.0
    for count in range(len(fastest) - 1, 0, -1):
        if fastest[count] == fastest[count - 1]:  # GPUs of one kind stay together
            continue
        faster = with_all / step_time(shares(num_rows, fastest[:count]), fastest[:count])
        if faster >= WORTH_LEAVING_OUT * best:
            keep, best = count, faster
    return keep, best


def plan_words(option: str, num_rows: int, names: Sequence[str]) -> str:
    """The plan's sentence about unlike GPUs; '' for like ones, or a single one.

    An estimate from peak rates: what the ranks really get is measured at the start.
    """
    if len(set(names)) < 2:
        return ""
    weights = parse_weights(option, len(names))
    if weights:
        return f"rows by hand: {by_rank(names, shares(num_rows, weights))}"
    speeds = [peak_tflops(name) for name in names]
    if None in speeds:
        unknown = next(name for name, speed in zip(names, speeds, strict=True) if speed is None)
        begin = "unlike GPUs, equal rows" if option == "equal" else "rows by speed, measured at the start"
        return f"{begin}; no estimate, for the rate of {unknown} is not known"
    gain = gain_over_equal(num_rows, speeds)
    likely = by_rank(names, shares(num_rows, speeds))
    if option == "equal":
        text = f"equal rows on unlike GPUs; by speed a step would be about {gain:.2f}x faster (--balance auto)"
    else:
        text = f"rows by speed, measured at the start; by peak rates {likely}, about {gain:.2f}x equal shares"
    keep, faster = fastest_without_slow(num_rows, speeds)
    if keep < len(names):
        slowest_kept = sorted(speeds, reverse=True)[keep - 1]
        slow = sorted({name for name, speed in zip(names, speeds, strict=True) if speed < slowest_kept})
        text += f"; leaving out {' and '.join(slow)} would be about {faster:.2f}x faster still"
    return text


def by_rank(names: Sequence[str], rows: Sequence[int]) -> str:
    """ "3 rows for A800, 1 for A40": neighbours that are alike are told once."""
    groups: list[list] = []
    for name, count in zip(names, rows, strict=True):
        if groups and groups[-1][:2] == [name, count]:
            groups[-1][2] += 1
        else:
            groups.append([name, count, 1])
    words = [f"{count} for {f'each of {n} x ' if n > 1 else ''}{name}" for name, count, n in groups]
    return ", ".join(words)


def shares(num_rows: int, weights: list[float]) -> list[int]:
    """Rows for each rank so that the slowest is done as early as can be, at least one each, summing to ``num_rows``.

    ``weights`` are speeds: n rows take a rank n / weight. Each next row goes where it is finished first (D'Hondt's
    rule), which gives the least possible maximum; where proportional shares are whole numbers, they are the result.

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
