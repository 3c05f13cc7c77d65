"""Batch arithmetic: rows of an optimizer step, and the micro-batches they can be divided into. Pure functions."""

from flare.config.options import STAGE_DEFAULTS, Options
from flare.errors import ConfigError


def global_batch_size(options: Options, world_size: int, saved: int | None = None) -> int:
    """Rows of an optimizer step over all processes.

    With ``--per_device_train_batch_size auto`` and no ``--global_batch_size``, the stage's default micro-batch counts:
    the memory of the GPUs must not change what is trained.

    Args:
        saved: rows of a step of the run that is resumed. They are valid for any number of processes, of which some
            may get one row more.
    Raises: ConfigError when ``--global_batch_size`` is not divisible into micro-batches on every process.
    """
    micro, requested = options.per_device_train_batch_size, options.global_batch_size
    if requested is None:
        rows = default_micro_batch(options) if micro == "auto" else micro
        return rows * world_size * options.gradient_accumulation_steps
    unit = world_size * (1 if micro == "auto" else micro)
    if requested % unit and (requested != saved or requested < world_size):
        below = requested // unit * unit
        nearest = ", ".join(str(n) for n in (below, below + unit) if n)
        parts = f"{world_size} process{'es' if world_size > 1 else ''}"
        parts += "" if micro == "auto" else f" x --per_device_train_batch_size {micro}"
        raise ConfigError(f"--global_batch_size {requested} is not divisible by {parts}; nearest: {nearest}")
    return requested


def micro_batch_choices(options: Options, rows: int, world_size: int) -> list[int]:
    """Micro-batch sizes to try, largest first: the given one, or with ``auto`` the divisors of the rows that a process
    gets of the ``rows`` of a step."""
    rows = rows // world_size
    if options.per_device_train_batch_size != "auto":
        return [options.per_device_train_batch_size]
    return [size for size in range(rows, 0, -1) if rows % size == 0]


def default_micro_batch(options: Options) -> int:
    """The default micro-batch size of the stage."""
    return STAGE_DEFAULTS[options.stage]["per_device_train_batch_size"]
