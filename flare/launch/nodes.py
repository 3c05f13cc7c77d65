"""Where the processes of a run meet: one host, or several that the environment names. Standard library only.

Several hosts use torchrun's own variables: ``NNODES NODE_RANK MASTER_ADDR MASTER_PORT`` (docs/scaling.md).
"""

import fcntl
import os
import re
import socket
import struct
import uuid

from flare.errors import ConfigError

DEFAULT_PORT = 29500
SIOCGIFADDR = 0x8915
"""ioctl that gives an interface's IPv4 address. Source: netdevice(7)."""


def num_nodes() -> int:
    """Hosts of the run: ``NNODES`` of the environment, else one.

    Raises: ConfigError for anything but a number; a range is torchrun's elastic mode, which no run here uses.
    """
    return _number("NNODES", 1, 1, 100_000)


def node_rank() -> int:
    """This host's number among the run's, from 0.

    Raises: ConfigError when ``NODE_RANK`` is no number below ``NNODES``.
    """
    return _number("NODE_RANK", 0, 0, num_nodes() - 1) if num_nodes() > 1 else 0


def master() -> tuple[str, int]:
    """Address and port of the host with ``NODE_RANK`` 0.

    Raises: ConfigError for a port that is none.
    """
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), _number("MASTER_PORT", DEFAULT_PORT, 1, 65535)


def _number(name: str, default: int, low: int, high: int) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    if not re.fullmatch("[0-9]{1,6}", text) or not low <= int(text) <= high:
        raise ConfigError(f"{name}={text!r} in the environment must be a number from {low} to {high}")
    return int(text)


def check_node_variables(name_was_given: bool) -> None:
    """The variables that several hosts need, before anything is started.

    Raises: ConfigError for what is missing. A default experiment name is the clock's: hosts would differ.
    """
    if num_nodes() == 1:
        return
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not os.environ.get(name)]
    if missing:
        raise ConfigError(f"NNODES={num_nodes()} needs {' and '.join(missing)} in the environment, too")
    node_rank(), master()
    if not name_was_given:
        raise ConfigError(f"NNODES={num_nodes()} needs --experiment_name: all hosts write one experiment")


def rendezvous() -> dict:
    """Arguments for torchrun's ``LaunchConfig``. One host: any free port, so that two runs never collide."""
    nodes = num_nodes()
    shape = {"min_nodes": nodes, "max_nodes": nodes}
    if nodes == 1:
        # Without local_addr workers are told this host's name, which need not resolve.
        return shape | {
            "run_id": uuid.uuid4().hex, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0",
            "local_addr": "127.0.0.1",
        }  # fmt: skip
    address, port = master()
    return shape | {
        "run_id": "flare", "rdzv_backend": "static", "rdzv_endpoint": f"{address}:{port}",
        "rdzv_configs": {"rank": node_rank()},
    }  # fmt: skip


def gloo_environment() -> dict[str, str]:
    """The network interface that gloo shall use, unless the user named one.

    Gloo by itself takes the address that the host's name resolves to: on Debian 127.0.1.1, in containers
    often nothing, and then other hosts cannot reach it.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return {}
    interface = interface_to(*(master() if num_nodes() > 1 else ("127.0.0.1", DEFAULT_PORT)))
    return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def interface_to(address: str, port: int) -> str | None:
    """Name of the interface that this host reaches ``address`` (IPv4 or a name) through; None when unknown."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port))  # UDP: chooses the route, sends nothing
            own = probe.getsockname()[0]
            return next((name for _, name in socket.if_nameindex() if _ipv4(probe, name) == own), None)
    except OSError:
        return None


def _ipv4(probe: socket.socket, interface: str) -> str | None:
    try:
        answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:  # an interface without IPv4
        return None
    return socket.inet_ntoa(answer[20:24])
