"""``python -m flare.gpus``: print the GPUs as a table, and the GPUs that a run would select. Starts nothing.

The selection itself is in selection.py. This file only parses the command line and formats text.
"""

import io
import os
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress

from flare.argument_parser import OneLineParser
from flare.errors import ConfigError, EnvError, run_script
from flare.gpus.nvidia_smi import Gpu, query_gpus
from flare.gpus.selection import (
    GpuRequest,
    format_gib,
    list_gpus,
    parse_gpu_ids,
    select_environment,
    select_gpus,
    visible_gpus,
)

EXAMPLES = """examples:
  python -m flare.gpus
  python -m flare.gpus --gpu_type A800
  python -m flare.gpus --gpu_ids 0,1,4-7
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the selection. Exit codes: see flare.errors (2: the request, 4: nvidia-smi)."""
    parser = OneLineParser(
        "python -m flare.gpus",
        "[--gpu_type NAME | --gpu_ids ID ...] [flags]",
        "Print the GPUs as a table, and the GPUs that a run would select. Starts nothing.",
        EXAMPLES,
    )
    group = parser.add_argument_group("selection, as in a run")
    which = group.add_mutually_exclusive_group()
    words = 'words of the model name, as "A40" or "A800 80GB"; auto: every GPU'
    which.add_argument("--gpu_type", metavar="NAME", help=words)
    which.add_argument("--gpu_ids", nargs="+", metavar="ID", help="nvidia-smi's indices: 0 1, 0,1 or 0-3")
    group.add_argument("--allow_busy_gpus", action="store_true", help="also select GPUs that are in use")
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # any GPU name can be printed, whatever the locale
        sys.stdout.reconfigure(errors="replace")

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        gpu_ids = None if args.gpu_ids is None else parse_gpu_ids(args.gpu_ids)
    except ConfigError as error:
        raise with_gpus_found(error) from None
    gpus = query_gpus(visible=visible)
    allowed, _ = visible_gpus(gpus, visible)
    hidden = [gpu for gpu in gpus if gpu not in allowed]
    try:
        selection = select_gpus(GpuRequest(args.gpu_type, gpu_ids, args.allow_busy_gpus), gpus, visible)
    except ConfigError:  # the table helps to correct the request; flushed, to come before the error
        print(format_table(gpus, [], hidden), flush=True)
        raise
    print(format_table(gpus, selection.gpus, hidden))
    print("\n".join(["", *selection.describe()]))
    print(" ".join(f"{key}={value}" for key, value in select_environment(selection).items()))
    return 0


def with_gpus_found(error: ConfigError) -> ConfigError:
    """The same error with the list of GPUs appended, when nvidia-smi works.

    For requests that are invalid on any machine and fail before the GPUs are queried.
    """
    with suppress(EnvError):
        return ConfigError(f"{error}; GPUs found: {list_gpus(query_gpus())}")
    return error


def format_table(gpus: Sequence[Gpu], chosen: Collection[Gpu], hidden: Collection[Gpu] = ()) -> str:
    """Aligned text: index, name, memory, free, state (free, busy, hidden, chosen; "chosen, busy").

    Args:
        hidden: the GPUs outside CUDA_VISIBLE_DEVICES.
    """
    rows = [("GPU", "name", "memory", "free", "state")]
    for gpu in gpus:
        states = ["chosen"] if gpu in chosen else ["hidden"] if gpu in hidden else []
        states += ["busy"] if gpu.is_busy else []
        state = ", ".join(states) or "free"
        rows.append(
            (str(gpu.index), gpu.name, format_gib(gpu.memory_total_mib), format_gib(gpu.memory_free_mib), state)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{index:>{widths[0]}}  {name:<{widths[1]}}  {memory:>{widths[2]}}  {free:>{widths[3]}}  {state}"
        for index, name, memory, free, state in rows
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
