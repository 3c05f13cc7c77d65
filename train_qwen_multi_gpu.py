#!/usr/bin/env python3
"""Train one stage of a Qwen model with NoPE layers on one or more GPUs.

Started with python, it chooses GPUs and starts its own workers. Started by torchrun, it is one of the workers.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flare.config.parse import ResolvedOptions, resolve
from flare.cpu import wait_without_spinning
from flare.errors import run_script
from flare.logs import quiet_torchao

if TYPE_CHECKING:
    from flare.gpus.selection import Selection
    from flare.run.run import Run

SCRIPT = Path(__file__).resolve()


def main(argv: list[str] | None = None) -> int:
    wait_without_spinning()
    quiet_torchao()
    resolved = resolve(sys.argv[1:] if argv is None else argv)
    if resolved.options.prepare_only:
        return prepare(resolved)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return join(resolved)
    return start(resolved)


def prepare(resolved: ResolvedOptions) -> int:
    """Build the token cache of a run and print its facts. Needs no GPU."""
    from flare.train.prepare_data import prepare_only

    print("\n".join(prepare_only(resolved)))
    return 0


def start(resolved: ResolvedOptions) -> int:
    """Choose the hardware, resolve the run, then train here or start workers."""
    from flare.launch import launch
    from flare.launch.hardware import choose_gpus, choose_hardware, exclude_small_gpus
    from flare.launch.nodes import check_node_variables
    from flare.plan.plan import check_fits
    from flare.run.resolve import resolve_run

    check_node_variables(not resolved.name_is_default)
    selection = choose_gpus(resolved.options)
    run = resolve_run(resolved, choose_hardware(resolved.options, selection))
    if selection:
        selection = exclude_small_gpus(run, selection)
        run = resolve_run(resolved, choose_hardware(resolved.options, selection))
    hardware = run.hardware
    for line in selection.describe() if selection else ():
        print(line, file=sys.stderr)
    if resolved.options.dry_run:
        show_plan(run)
        print(f"command: {launch.shell_command(SCRIPT, run, selection)}")
        return 0
    check_fits(run.plan())
    with launch.reserved_experiment_name(run.resolved) as named:
        return launch_run(resolve_run(named, hardware), selection)


def show_plan(run: "Run") -> None:
    """Print the plan. Raises: ConfigError, EnvError if it does not fit."""
    from flare.data.corpus import split_names
    from flare.data.sources.open import is_missing_path
    from flare.plan.plan import check_fits
    from flare.plan.table import plan_lines

    missing = filter(is_missing_path, split_names(run.options.dataset_name))
    no_data = [f"--dataset_name {name} is not on this machine; a run needs it" for name in missing]
    for warning in [*run.resolved.warnings, *no_data]:
        print(f"warning: {warning}", file=sys.stderr)
    plan = run.plan()
    print("\n".join(plan_lines(plan)), flush=True)
    check_fits(plan)


def launch_run(run: "Run", selection: "Selection | None") -> int:
    """Train in this process if it is the only one, otherwise start workers."""
    from flare.launch import launch
    from flare.launch.hardware import check_torch_sees_cuda
    from flare.launch.worker_environment import export_environment

    export_environment(run, selection)
    if run.hardware.use_cuda:
        check_torch_sees_cuda()
    if run.hardware.world_size == 1:
        from flare.train.worker import run_worker

        return run_worker(run)
    return launch.start_workers(SCRIPT, run)


def join(resolved: ResolvedOptions) -> int:
    """Train as one of torchrun's workers. In a dry run rank 0 prints the plan."""
    from flare.distributed.process_group import end_process
    from flare.launch.worker_environment import options_from_launcher, worker_hardware
    from flare.run.resolve import resolve_run
    from flare.train.worker import run_worker

    resolved = options_from_launcher(resolved)
    run = resolve_run(resolved, worker_hardware(resolved.options))
    if not resolved.options.dry_run:
        end_process(run_worker(run))
    if os.environ["RANK"] == "0":
        show_plan(run)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
