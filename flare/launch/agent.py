"""torchrun's agent: starts the workers of this node, passes signals on, ends them."""

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flare.errors import EnvError, first_line
from flare.launch.nodes import master, num_nodes, rendezvous
from flare.terminal import tell_of_stop

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException


INTERRUPTED = "interrupted"


SHUTDOWN_TIMEOUT_SEC = 600
"""What torchrun's agent grants workers after a signal: a large model's last checkpoint takes minutes."""


def run_agent(script: Path, argv: list[str], local_world_size: int, logs: "DefaultLogsSpecs | None" = None) -> None:
    """Run a script once a rank through torchrun's agent, to its end.

    Args:
        logs: where workers leave their errors; a new place by default.
    Raises: SignalException, ChildFailedError of torchrun; EnvError when this host does not meet the others.
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
    # What a worker's end means we say ourselves.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-u", str(script), *argv)
    except DistError as error:
        address, port = master()
        raise EnvError(
            f"the {num_nodes()} hosts of this run do not meet at {address}:{port}: {first_line(error)}; "
            "see NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT (another one if it is in use)"
        ) from error


def shutdown_timeout_arguments(config_class: type) -> dict[str, int]:
    """What grants workers ``SHUTDOWN_TIMEOUT_SEC``; torch 2.11 has none: there it is a method's default."""
    if "shutdown_timeout" in config_class.__dataclass_fields__:
        return {"shutdown_timeout": SHUTDOWN_TIMEOUT_SEC}
    from torch.distributed.elastic.multiprocessing.api import PContext

    PContext.close.__defaults__ = (None, SHUTDOWN_TIMEOUT_SEC)  # (death_sig, timeout)
    return {}


def _on_interrupt(_number: int, _frame: object) -> None:
    """First Ctrl-C: workers finish their step and write a checkpoint. Second: all end at once."""
    from torch.distributed.elastic.multiprocessing import SignalException

    signal.signal(signal.SIGINT, _on_second_interrupt)
    tell_of_stop()
    raise SignalException(INTERRUPTED, sigval=signal.SIGTERM)


def received_signal(error: "SignalException") -> signal.Signals:
    """The signal that this process got. Ctrl-C goes on to workers as SIGTERM: one that is still starting then ends
    without a traceback."""
    return signal.SIGINT if error.args == (INTERRUPTED,) else error.sigval


def _on_second_interrupt(_number: int, _frame: object) -> None:
    kill_workers()
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def kill_workers() -> None:
    """Workers have sessions of their own, so the terminal's Ctrl-C does not reach them: end them from here."""
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            os.killpg(int(pid), signal.SIGKILL)
