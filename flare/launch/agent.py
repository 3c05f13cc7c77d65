"""torchrun's agent: starts the workers of this node, forwards signals to them, and ends them."""

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flare.errors import EnvError, first_line
from flare.launch.nodes import master, num_nodes, rendezvous
from flare.terminal import print_stop_notice

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException


INTERRUPTED = "interrupted"


SHUTDOWN_TIMEOUT_SEC = 600
"""Time for workers to end after a signal. Saving the last checkpoint of a large model takes minutes."""


def run_agent(script: Path, argv: list[str], local_world_size: int, logs: "DefaultLogsSpecs | None" = None) -> None:
    """Run a script in one process per rank through torchrun's agent, and wait until all have ended.

    Args:
        logs: where workers write their errors; a new directory by default.
    Raises: torchrun's SignalException and ChildFailedError; EnvError when this node cannot connect to the others.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local_world_size)))
    config = LaunchConfig(
        nproc_per_node=local_world_size,
        max_restarts=0,
        logs_specs=logs or DefaultLogsSpecs(),
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT,SIGUSR1",
        **shutdown_timeout_arguments(LaunchConfig),
        **rendezvous(),
    )
    signal.signal(signal.SIGINT, _on_interrupt)
    # Flare reports by itself how a worker ended.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-u", str(script), *argv)
    except DistError as error:
        address, port = master()
        raise EnvError(
            f"the {num_nodes()} nodes of this run cannot connect at {address}:{port}: {first_line(error)}; "
            "check NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT (choose another port if it is in use)"
        ) from error


def shutdown_timeout_arguments(config_class: type) -> dict[str, int]:
    """Arguments of ``LaunchConfig`` that set the shutdown timeout of workers to ``SHUTDOWN_TIMEOUT_SEC``.

    torch 2.11 has no such argument. There, the timeout is a default of a method, which is replaced.
    """
    if "shutdown_timeout" in config_class.__dataclass_fields__:
        return {"shutdown_timeout": SHUTDOWN_TIMEOUT_SEC}
    from torch.distributed.elastic.multiprocessing.api import PContext

    PContext.close.__defaults__ = (None, SHUTDOWN_TIMEOUT_SEC)  # (death_sig, timeout)
    return {}


def _on_interrupt(_number: int, _frame: object) -> None:
    """On the first Ctrl-C, workers finish their step and save a checkpoint. The second one ends all at once."""
    from torch.distributed.elastic.multiprocessing import SignalException

    signal.signal(signal.SIGINT, _on_second_interrupt)
    print_stop_notice()
    raise SignalException(INTERRUPTED, sigval=signal.SIGTERM)


def received_signal(error: "SignalException") -> signal.Signals:
    """The signal that this process received. Ctrl-C reaches the workers as SIGTERM, so that a worker that is still
    starting ends without a traceback."""
    return signal.SIGINT if error.args == (INTERRUPTED,) else error.sigval


def _on_second_interrupt(_number: int, _frame: object) -> None:
    kill_workers()
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def kill_workers() -> None:
    """Kill all workers. Each has its own session, so the terminal's Ctrl-C does not reach them."""
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            os.killpg(int(pid), signal.SIGKILL)
