"""Batch arithmetic: rows of an optimizer step, and the micro-batches that they can be cut into. Pure."""

from flare.config.options import STAGE_DEFAULTS, Options
from flare.errors import ConfigError


def global_batch_size(options: Options, world_size: int, continued: int | None = None) -> int:
    """Rows of an optimizer step over all processes.

    With ``--per_device_train_batch_size auto`` and no ``--global_batch_size`` they are those of the stage's
    default micro-batch: what fits must not change what is trained.

    Args:
        continued: the rows of the run that goes on here. On any number of processes they stay: some get a row more.
    Raises: ConfigError when ``--global_batch_size`` is not a whole number of micro-batches on every process.
    """
    micro, asked = options.per_device_train_batch_size, options.global_batch_size
    if asked is None:
        rows = default_micro_batch(options) if micro == "auto" else micro
        return rows * world_size * options.gradient_accumulation_steps
    unit = world_size * (1 if micro == "auto" else micro)
    if asked % unit and (asked != continued or asked < world_size):
        below = asked // unit * unit
        nearest = ", ".join(str(n) for n in (below, below + unit) if n)
        parts = f"{world_size} process{'es' if world_size > 1 else ''}"
        parts += "" if micro == "auto" else f" x --per_device_train_batch_size {micro}"
        raise ConfigError(f"--global_batch_size {asked} is not divisible by {parts}; nearest: {nearest}")
    return asked


def micro_batch_choices(options: Options, rows: int, world_size: int) -> list[int]:
    """Micro-batches to try, largest first: the given one, or for ``auto`` the divisors of a process's share of
    the ``rows`` of a step."""
    rows = rows // world_size
    if options.per_device_train_batch_size != "auto":
        return [options.per_device_train_batch_size]
    return [size for size in range(rows, 0, -1) if rows % size == 0]


def default_micro_batch(options: Options) -> int:
    """The guide's micro-batch of the stage."""
    return STAGE_DEFAULTS[options.stage]["per_device_train_batch_size"]
