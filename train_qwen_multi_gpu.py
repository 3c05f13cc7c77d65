#!/usr/bin/env python3
"""Train one stage of a Qwen model with NoPE layers on one or many GPUs.

Started plainly it chooses the cards and starts its own workers; under torchrun it joins.
"""

import os
import sys
from pathlib import Path

from flare.config import Resolved, resolve
from flare.errors import run_script

SCRIPT = Path(__file__).resolve()


def main(argv: list[str] | None = None) -> int:
    resolved = resolve(sys.argv[1:] if argv is None else argv)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return join(resolved)
    return start(resolved)


def start(resolved: Resolved) -> int:
    """Choose the hardware, settle the run, then train here or start workers."""
    from flare import launch
    from flare.setup import settle

    hardware, selection = launch.choose_hardware(resolved.options)
    run = settle(resolved, hardware)
    for line in selection.describe() if selection else ():
        print(line, file=sys.stderr)
    if resolved.options.dry_run:
        print(f"command: {launch.shell_command(SCRIPT, resolved, hardware, selection)}")
        return 0
    launch.export_environment(hardware, selection)
    if hardware.use_cuda:
        launch.check_torch_sees_cuda()
    from flare.logs import start_logging
    from flare.session import packed_rows, prepare_data, run_worker

    start_logging()
    if hardware.world_size == 1:
        return run_worker(run)
    cache = prepare_data(run)  # before any process group: a long build would run into its timeout
    packed_rows(run, cache)
    os.environ[launch.TOKEN_CACHE_VARIABLE] = str(cache.directory)
    local = hardware.world_size // launch.num_nodes()
    return launch.start_workers(SCRIPT, resolved.argv, local, run.experiment, resolved.options.stage)


def join(resolved: Resolved) -> int:
    """Be one of torchrun's workers."""
    from flare.launch import worker_hardware
    from flare.session import run_worker
    from flare.setup import settle

    return run_worker(settle(resolved, worker_hardware(resolved.options)))


if __name__ == "__main__":
    sys.exit(run_script(main))
