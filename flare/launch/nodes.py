"""The nodes of a run, from torchrun's environment variables, and their rendezvous. Standard library only.

A run on several nodes needs ``NNODES NODE_RANK MASTER_ADDR MASTER_PORT`` (docs/scaling.md).
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
"""ioctl that returns the IPv4 address of an interface. Source: netdevice(7)."""


def num_nodes() -> int:
    """Number of nodes of the run: ``NNODES`` in the environment, default 1.

    Raises: ConfigError when it is not a number. A range would be torchrun's elastic mode, which is not supported.
    """
    return _number("NNODES", 1, 1, 100_000)


def node_rank() -> int:
    """Rank of this node, from 0.

    Raises: ConfigError when ``NODE_RANK`` is not a number below ``NNODES``.
    """
    return _number("NODE_RANK", 0, 0, num_nodes() - 1) if num_nodes() > 1 else 0


def master() -> tuple[str, int]:
    """(address, port) of the node with ``NODE_RANK`` 0.

    Raises: ConfigError for an invalid port.
    """
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), _number("MASTER_PORT", DEFAULT_PORT, 1, 65535)


def _number(name: str, default: int, low: int, high: int) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    if not re.fullmatch("[0-9]{1,6}", text) or not low <= int(text) <= high:
        raise ConfigError(f"{name}={text!r} in the environment must be a number from {low} to {high}")
    return int(text)


def check_node_variables(name_was_given: bool) -> None:
    """Check the environment variables of a run on several nodes, before anything is started.

    Raises: ConfigError when a variable is missing, or the experiment name: a default name is made from the time, so
        the nodes would disagree.
    """
    if num_nodes() == 1:
        return
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not os.environ.get(name)]
    if missing:
        raise ConfigError(f"NNODES={num_nodes()} needs {' and '.join(missing)} in the environment")
    node_rank(), master()
    if not name_was_given:
        raise ConfigError(f"NNODES={num_nodes()} needs --experiment_name, because all nodes write to one experiment")


def rendezvous() -> dict:
    """Rendezvous arguments for torchrun's ``LaunchConfig``. A single node uses a free port: runs never collide."""
    nodes = num_nodes()
    shape = {"min_nodes": nodes, "max_nodes": nodes}
    if nodes == 1:
        # Without local_addr, workers would get the name of this host, which may not resolve.
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
    """The environment variable that sets gloo's network interface; empty if the user has set it.

    By default gloo uses the address that the host name resolves to. That is 127.0.1.1 on Debian and often none in
    containers, so other nodes could not reach it.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return {}
    interface = interface_to(*(master() if num_nodes() > 1 else ("127.0.0.1", DEFAULT_PORT)))
    return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def interface_to(address: str, port: int) -> str | None:
    """Name of the network interface for the route to ``address`` (IPv4 or a name); None when unknown."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port))  # UDP: chooses a route and sends nothing
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
